from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from rankflow.ablation.methods.adalora import AdaloraMethod
from rankflow.ablation.methods.boft import BoftMethod
from rankflow.ablation.methods.bottleneck import BottleneckAdapters
from rankflow.ablation.methods.full import FullFineTuning
from rankflow.ablation.methods.method import Built, UnsupportedError
from rankflow.ablation.methods.peft_tuners import TUNERS
from rankflow.ablation.methods.prompts import PROMPTS
from rankflow.ablation.sizing import Sized, choose_size, count_trainable
from rankflow.training.models import BaseModel

ROWS = {
    **TUNERS,
    **PROMPTS,
    "boft": BoftMethod(),
    "adalora": AdaloraMethod(),
    "bottleneck": BottleneckAdapters(),
}


def make_meta(case):
    base = case.base()
    return BaseModel(base.model.to("meta"), None, (), base.full_modules)


def count(method, case, setting, size):
    """Count by hand what a size trains in a real model."""
    built = method.build(case.base(), setting, size)
    if built.final is not None:
        return built.final()
    return sum(
        parameter.numel()
        for name, parameter in built.model.named_parameters()
        if parameter.requires_grad and "classifier" not in name and "pooler" not in name
    )


@pytest.mark.parametrize("name", ROWS)
def test_the_size_is_the_best_of_all_sizes_for_every_budget(host_case, name):
    method = ROWS[name]
    setting = host_case.setting()
    sizes = method.sizes(host_case.base(), setting)[:10]
    counts = [count(method, host_case, setting, size) for size in sizes]
    assert counts == sorted(counts)
    middle = len(counts) // 2 - 1
    for budget in (counts[0] - 1, counts[middle], counts[middle + 1] - 1, counts[-2] + 1):
        covered = [i for i, parameters in enumerate(counts) if parameters <= budget]
        best = covered[-1] if covered else 0
        setting = host_case.setting(parameters=budget)
        found = choose_size(method, lambda: make_meta(host_case), setting)
        assert found == Sized(sizes[best], counts[best]), budget


@dataclass
class Fake:
    """A method whose sizes cost what the test says."""

    costs: list[int]
    size_name: str = "width"
    built: list[int] = field(default_factory=list)

    def sizes(self, base, setting):
        return [10 + index for index in range(len(self.costs))]

    def build(self, base, setting, size):
        self.built.append(size)
        base.model.extra = nn.Parameter(torch.empty(self.costs[size - 10], device="meta"))
        return Built(base.model)


def fresh():
    return BaseModel(nn.Linear(2, 2).requires_grad_(False), None, (), ())


COSTS = {
    "affine": [7 + 3 * size for size in range(1000)],
    "square": [size * size for size in range(200)],
    "steps": [10 * (size // 10) for size in range(200)],
    "one jump": [1] * 50 + [1000] * 50,
    "single": [5],
    "exponential": [2**size for size in range(20)],
}


@pytest.mark.parametrize("costs", COSTS.values(), ids=COSTS.keys())
@pytest.mark.parametrize("budget", [0, 1, 5, 6, 7, 8, 63, 100, 640, 999, 1000, 10**6])
def test_any_monotone_costs_are_searched_to_the_last_size_within(host_cases, costs, budget):
    method = Fake(costs)
    setting = host_cases["token classifier"].setting(parameters=budget)
    sized = choose_size(method, fresh, setting)
    covered = [index for index, cost in enumerate(costs) if cost <= budget]
    assert sized.parameters == costs[covered[-1] if covered else 0]
    assert sized.size == 10 + (covered[-1] if covered else 0)
    assert len(method.built) == len(set(method.built)) <= 3 * len(costs).bit_length() + 2


def test_affine_costs_take_four_builds(host_cases):
    method = Fake(COSTS["affine"])
    choose_size(method, fresh, host_cases["token classifier"].setting(parameters=1500))
    assert len(method.built) <= 4


def test_every_build_gets_a_base_of_its_own(host_cases):
    bases = []

    def make():
        bases.append(fresh())
        return bases[-1]

    choose_size(Fake([1, 2, 3]), make, host_cases["token classifier"].setting(parameters=2))
    assert not hasattr(bases[0].model, "extra")  # only asked for the sizes
    assert all(hasattr(base.model, "extra") for base in bases[1:])


def test_a_method_without_a_size_is_only_counted(host_cases):
    case = host_cases["token classifier"]
    parameters = case.base().model.named_parameters()
    whole = sum(p.numel() for name, p in parameters if "classifier" not in name)
    found = choose_size(FullFineTuning(), lambda: make_meta(case), case.setting())
    assert found == Sized(None, whole)


def test_a_method_that_fits_nowhere_is_refused(host_cases):
    with pytest.raises(UnsupportedError, match="no size"):
        choose_size(Fake([]), fresh, host_cases["token classifier"].setting())


def test_a_head_is_counted_apart_however_peft_wraps_it(host_cases):
    case = host_cases["classifier with a new pooler"]
    head = 16 * 16 + 16 + 3 * 16 + 3
    for name, size in (("vera", 6), ("prompt", 3), ("bottleneck", 2)):
        base = case.base()
        built = ROWS[name].build(base, case.setting(), size)
        everything = sum(p.numel() for p in built.model.parameters() if p.requires_grad)
        adapter, counted = count_trainable(built.model, base.full_modules)
        assert (counted, adapter) == (head, everything - head), name


def test_a_module_that_is_only_called_like_a_head_is_no_head():
    model = nn.ModuleDict(
        {"classifier_norm": nn.Linear(2, 2, bias=False), "classifier": nn.Linear(3, 1)}
    )
    assert count_trainable(model, ("classifier",)) == (4, 4)
