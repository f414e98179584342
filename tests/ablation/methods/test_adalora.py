import copy

import pytest
import torch
from datasets import Dataset
from peft import AdaLoraConfig, get_peft_model
from peft.tuners.adalora import SVDLinear
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from rankflow.ablation.methods.adalora import AdaloraMethod, add_penalty_gradient, schedule
from rankflow.ablation.methods.method import UnsupportedError
from rankflow.ablation.methods.targets import find_targets
from rankflow.training.pooling import pool

METHOD = AdaloraMethod()
STEPS = 20
SIZE = 9


class PooledTrainer(Trainer):
    """Computes its loss from logits, so that PEFT has no loss to add to."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        logits = model(inputs["input_ids"], inputs["attention_mask"]).logits
        logits = pool(logits, inputs["attention_mask"], "mean")
        return functional.cross_entropy(logits, inputs["labels"])


def sites_of(model):
    return [module for module in model.modules() if isinstance(module, SVDLinear)]


def randomise(model):
    with torch.no_grad():
        for site in sites_of(model):
            for parameter in (site.lora_A, site.lora_B, site.lora_E):
                parameter["default"].copy_(torch.randn_like(parameter["default"]))


@pytest.fixture
def pooled(host_cases):
    return host_cases["token classifier"]


@pytest.fixture
def fit(pooled, tmp_path):
    """Train a built model under a Trainer that computes its own loss."""

    def run(model, callbacks, **keys):
        generator = torch.Generator().manual_seed(3)
        rows = {
            "input_ids": torch.randint(13, (64, 6), generator=generator).tolist(),
            "attention_mask": [[1] * 6] * 64,
            "labels": torch.randint(3, (64,), generator=generator).tolist(),
        }
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=STEPS,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            **keys,
        )
        trainer = PooledTrainer(
            model,
            arguments,
            train_dataset=Dataset.from_dict(rows).with_format("torch"),
            callbacks=list(callbacks),
        )
        trainer.train()
        return trainer

    return run


def test_as_many_components_as_asked_for_are_kept_and_counted(pooled, fit):
    targets = find_targets(pooled.base(), pooled.setting())
    built = METHOD.build(pooled.base(), pooled.setting(steps=STEPS), SIZE)
    costs = [target.inputs + target.outputs + 1 for target in targets.values()]
    assert built.final() == SIZE * sum(costs) // len(costs)
    fit(built.model, built.callbacks)
    kept = [(site.lora_E["default"] != 0).sum().item() for site in sites_of(built.model)]
    assert sum(kept) == SIZE
    assert built.final() == sum(n * cost for n, cost in zip(kept, costs, strict=True))
    assert len(set(kept)) > 1


def test_what_is_not_kept_has_no_effect_on_the_outputs(pooled, fit):
    built = METHOD.build(pooled.base(), pooled.setting(steps=STEPS), SIZE)
    fit(built.model, built.callbacks)
    batch = {key: pooled.batch()[key] for key in ("input_ids", "attention_mask")}
    logits = built.model.eval()(**batch).logits
    with torch.no_grad():
        for site in sites_of(built.model):
            dead = (site.lora_E["default"] == 0).squeeze(1)
            site.lora_A["default"][dead] = 7.0
            site.lora_B["default"][:, dead] = 7.0
    torch.testing.assert_close(built.model(**batch).logits, logits)


def test_components_die_between_the_warm_up_and_the_last_part(pooled, fit):
    built = METHOD.build(pooled.base(), pooled.setting(steps=STEPS), SIZE)
    seen = []

    class Watch(type(built.callbacks[0])):
        def on_step_end(self, args, state, control, **_):
            live = sum((site.lora_E["default"] != 0).sum().item() for site in self._sites)
            seen.append((state.global_step, live))

    watch = Watch(built.model.base_model, sites_of(built.model))
    fit(built.model, [watch])
    live = dict(seen)
    warmup, end, _ = schedule(STEPS)
    whole = sum(len(site.lora_E["default"]) for site in sites_of(built.model))
    assert live[warmup] == whole
    assert live[warmup + 1] < whole
    assert {live[step] for step in range(STEPS - end, STEPS + 1)} == {SIZE}


def test_the_penalty_is_that_of_pefts_own_loss(host_cases):
    case = host_cases["language model"]
    config = AdaLoraConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        init_r=4,
        total_step=10,
        orth_reg_weight=0.5,
    )
    theirs = get_peft_model(case.base(torch.float64).model, config).double()
    randomise(theirs)
    ours = copy.deepcopy(theirs)
    ours.peft_config["default"].orth_reg_weight = 0.0
    for model in (theirs, ours):
        model(**case.batch()).loss.backward()
    add_penalty_gradient(sites_of(ours), 0.5)
    for (name, expected), (_, found) in zip(
        theirs.named_parameters(), ours.named_parameters(), strict=True
    ):
        if expected.requires_grad:
            torch.testing.assert_close(found.grad, expected.grad, msg=name)


def test_a_square_factor_is_pulled_the_right_way(host_cases):
    case = host_cases["language model"]
    built = METHOD.build(case.base(torch.float64), case.setting(), 16 * 14 * 2 // 3)
    model = built.model.double()
    randomise(model)
    site = next(s for s in sites_of(model) if s.lora_A["default"].shape[0] == s.in_features)
    for parameter in (site.lora_A["default"], site.lora_B["default"]):
        parameter.requires_grad_(True)
    right, left = site.lora_A["default"], site.lora_B["default"]
    eye = torch.eye(len(right), dtype=torch.float64)
    loss = (right @ right.T - eye).norm() + (left.T @ left - eye).norm()
    expected = torch.autograd.grad(loss / 2, (right, left))
    add_penalty_gradient([site], 1.0)
    torch.testing.assert_close((right.grad, left.grad), expected)


def test_the_penalty_reaches_a_trainer_that_computes_its_own_loss(pooled, fit):
    def skew(model):
        right = torch.stack([s.lora_A["default"] for s in sites_of(model)[:2]])
        return (right @ right.mT - torch.eye(right.shape[1])).norm()

    def trained(callbacks):
        torch.manual_seed(0)
        built = METHOD.build(pooled.base(), pooled.setting(steps=STEPS), SIZE)
        fit(built.model, built.callbacks if callbacks else ())
        return skew(built.model)

    assert trained(callbacks=True) < 0.8 * trained(callbacks=False)


def test_the_loss_of_an_evaluation_has_no_penalty(host_cases):
    case = host_cases["language model"]
    built = METHOD.build(case.base(), case.setting(), SIZE)
    expected = case.base().model.eval()(**case.batch()).loss
    torch.testing.assert_close(built.model.eval()(**case.batch()).loss, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scale_is_that_of_lora(host_cases, dtype):
    case = host_cases["language model"]
    built = METHOD.build(case.base(dtype), case.setting(r=8, lora_alpha=24), 4 * SIZE)
    model = built.model.double()
    randomise(model)
    site = sites_of(model)[3]
    right, left = site.lora_A["default"], site.lora_B["default"]
    change = 3.0 * left @ site.lora_E["default"].squeeze(1).diag() @ right
    x = torch.randn(5, site.in_features, dtype=torch.float64)
    expected = x @ (site.base_layer.weight + change).T
    # PEFT adds 1e-5 to the rank that it divides by.
    torch.testing.assert_close(site(x), expected, rtol=1e-4, atol=1e-4)


def test_the_scale_of_a_narrow_base_does_not_train(host_cases):
    case = host_cases["language model"]
    built = METHOD.build(case.base(torch.bfloat16), case.setting(), SIZE)
    assert not [n for n, p in built.model.named_parameters() if "ranknum" in n and p.requires_grad]


@pytest.mark.parametrize("steps", [3, 4, 5, 7, 11])
def test_short_runs_allocate_too(host_cases, train, steps):
    case = host_cases["language model"]
    built = METHOD.build(case.base(), case.setting(steps=steps), SIZE)
    model, batch = built.model, case.batch()
    for step in range(1, steps + 1):
        model(**batch).loss.backward()
        model.base_model.update_and_allocate(step)
        if step == 1:
            with torch.no_grad():
                for site in sites_of(model):
                    site.lora_E["default"].add_(0.1)
        model.zero_grad()
    assert sum((site.lora_E["default"] != 0).sum().item() for site in sites_of(model)) <= SIZE


def test_a_run_that_is_too_short_is_refused(host_cases):
    case = host_cases["language model"]
    with pytest.raises(UnsupportedError, match="3 optimizer steps at least"):
        METHOD.sizes(case.base(), case.setting(steps=2))
