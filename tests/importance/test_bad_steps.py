import peft
import pytest
import torch
from torch import nn

from rankflow.adapters.sites import find_sites
from rankflow.errors import DivergenceError
from rankflow.importance import bad_steps
from rankflow.importance.bad_steps import BadSteps
from rankflow.importance.gradients import StepGradients

YES = torch.tensor(True)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))


class Loop:
    """Steps of which some are spoilt, counted as the engine does."""

    def __init__(self, limit=3):
        config = peft.LoraConfig(r=2, target_modules=["one", "two"], modules_to_save=["head"])
        self.model = peft.get_peft_model(Net(), config)
        self.sites = find_sites(self.model)
        others = [p for n, p in self.model.named_parameters() if "modules_to_save" in n and p.dim()]
        self.gradients = StepGradients(self.sites, [p for p in others if p.requires_grad])
        self.bad = BadSteps(self.sites, limit)
        self.number = 0

    def step(self, spoil=None, *, clip=False, loss=YES):
        self.model.zero_grad(set_to_none=True)
        handle = None if spoil is None else spoil(self)
        self.model(torch.ones(3, 4)).square().sum().backward()
        if handle is not None:
            handle.remove()
        if clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.number += 1
        reading = self.gradients.read()
        self.bad.count(self.number, reading, loss, self.gradients.parameters)

    def fail(self, *arguments, **keywords):
        """Go on until it stops, and return what it says."""
        with pytest.raises(DivergenceError) as caught:
            self.steps(9, *arguments, **keywords)
        return str(caught.value)

    def steps(self, count, *arguments, **keywords):
        for _ in range(count):
            self.step(*arguments, **keywords)


def at_gradient(name):
    def spoil(loop):
        parameter = next(p for n, p in loop.model.named_parameters() if name in n)
        return parameter.register_hook(lambda gradient: gradient * float("nan"))

    return spoil


def at_output(name):
    def spoil(loop):
        layer = loop.model.get_base_model().get_submodule(name).base_layer
        return layer.register_forward_hook(lambda module, x, output: output * float("nan"))

    return spoil


def test_bad_steps_that_are_not_in_a_row_never_stop_a_run():
    loop = Loop(limit=3)
    for _ in range(5):
        loop.step(at_gradient("one.lora_B"))
        loop.step(at_gradient("one.lora_B"))
        assert loop.bad.in_a_row == 2
        loop.step()
        assert loop.bad.in_a_row == 0


def test_the_last_of_the_allowed_stops_and_names_the_first():
    loop = Loop(limit=3)
    loop.step()
    said = loop.fail(at_gradient("two.lora_B"))
    assert loop.number == 4
    assert "3 steps in a row had gradients that are not finite, the first is step 2: " in said
    assert "the gradients of site 'two' were not finite" in said
    assert "lower the learning rate, train in bf16 instead of fp16, or look at the rows" in said


def test_a_limit_of_one_stops_at_once():
    loop = Loop(limit=1)
    assert "first is step 1: the gradients of site 'one'" in loop.fail(at_gradient("one.lora_B"))
    assert loop.number == 1


def test_where_clipping_has_spread_it_the_closer_look_names_the_site():
    said = Loop().fail(at_gradient("two.lora_B"), clip=True)
    assert "no gradient was finite; looked at closely, the first gradient" in said
    assert "that was not finite was that of site 'two';" in said


def test_the_first_layer_in_forward_is_named_before_gradients():
    said = Loop().fail(at_output("one"))
    assert "the first output that was not finite was that of site 'one';" in said


def test_the_task_head_is_told_from_the_adapter():
    said = Loop().fail(at_gradient("head.modules_to_save.default.weight"))
    assert "the gradients of the task head or other parameters beside the adapter were not" in said


def test_a_loss_that_is_not_finite_counts_where_gradients_are():
    said = Loop().fail(loss=torch.tensor(False))
    assert "3 steps in a row had a loss that is not finite, the first is step 1" in said
    assert "looked at closely" not in said


def test_no_hook_is_left_by_a_run_that_recovers_or_stops():
    def hooks(loop):
        parameters = [len(p._post_accumulate_grad_hooks or ()) for p in loop.model.parameters()]
        return parameters, [len(m._forward_hooks) for m in loop.model.modules()]

    loop = Loop(limit=4)
    healthy = hooks(loop)
    loop.step(at_gradient("one.lora_B"))
    assert hooks(loop) != healthy
    loop.step()
    assert hooks(loop) == healthy
    loop.fail(at_gradient("one.lora_B"))
    assert hooks(loop) == healthy


def test_a_restarted_count_goes_on_where_it_was():
    loop = Loop(limit=3)
    loop.number = 7
    loop.bad.restart(2)
    assert loop.bad.in_a_row == 2
    assert "the first is step 6" in loop.fail(at_gradient("one.lora_B"))
    assert loop.number == 8


class Late(bad_steps._Arrival):
    """Arrives one step later, unless it is waited for, as from a device."""

    waited = 0

    def is_there(self):
        there, self.asked = hasattr(self, "asked"), True
        return there

    def read(self):
        Late.waited += not hasattr(self, "asked")
        return super().read()


def test_a_count_that_arrives_late_stops_one_step_later_and_is_waited_for_only_in_trouble(
    monkeypatch,
):
    monkeypatch.setattr(bad_steps, "_Arrival", Late)
    loop = Loop(limit=2)
    for _ in range(5):
        loop.step()
    assert Late.waited == 0
    said = loop.fail(at_gradient("two.lora_B"))
    assert loop.number == 7
    assert Late.waited > 0
    assert "2 steps in a row" in said
    assert "the first is step 6" in said
