"""Choose the size at which a method fits a budget, and count what trains.

Parameters are counted by building the method on a model without numbers, so that no formula has to
know what a library adds.
"""

import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import nn

from rankflow.ablation.methods.method import Method, Setting, UnsupportedError
from rankflow.training.models import BaseModel

# Where PEFT puts the base model: nowhere, in a prompt's wrapper, in a tuner in its wrapper.
_ROOTS = ("", "base_model.", "base_model.model.")


@dataclass(frozen=True, slots=True)
class Sized:
    """A chosen size.

    Attributes:
        size: The size; None if the method has none.
        parameters: Parameters that adapt the model at this size, a task head left out.
    """

    size: int | None
    parameters: int


def choose_size(method: Method, make_base: Callable[[], BaseModel], setting: Setting) -> Sized:
    """Return the largest size that the budget covers, or else the smallest that there is.

    Args:
        method: The row; the parameters must not decrease along its sizes.
        make_base: Makes a fresh base model, which the build may change; on ``meta`` it is cheap.
        setting: The budget, and what else to fit into.

    Raises:
        UnsupportedError: The method cannot run on this model.
    """
    if not method.size_name:
        return Sized(None, _count(method, make_base(), setting, None))
    sizes = method.sizes(make_base(), setting)
    if not sizes:
        raise UnsupportedError("the method has no size that fits this model")
    index, parameters = _last_within(
        len(sizes),
        setting.parameters,
        lambda index: _count(method, make_base(), setting, sizes[index]),
    )
    return Sized(sizes[index], parameters)


def count_trainable(model: nn.Module, full_modules: Collection[str]) -> tuple[int, int]:
    """Return how many parameters train: those of the adaptation, and those of the task head.

    Args:
        model: A built model, wrapped by PEFT or not.
        full_modules: The modules of the head, by their names in the base model.
    """
    adapter = head = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and is_head(name, full_modules):
            head += parameter.numel()
        elif parameter.requires_grad:
            adapter += parameter.numel()
    return adapter, head


def is_head(name: str, full_modules: Collection[str]) -> bool:
    """Whether a parameter belongs to the task head, also under PEFT's names.

    >>> is_head("base_model.model.classifier.modules_to_save.default.weight", ("classifier",))
    True
    >>> is_head("base_model.model.bert.classifiers.weight", ("classifier",))
    False
    """
    heads = tuple(f"{root}{module}." for root in _ROOTS for module in full_modules)
    return name.startswith(heads)


def _count(method: Method, base: BaseModel, setting: Setting, size: int | None) -> int:
    full_modules = base.full_modules
    built = method.build(base, setting, size)
    if built.final is not None:
        return built.final()
    return count_trainable(built.model, full_modules)[0]


def _last_within(count: int, limit: int, cost: Callable[[int], int]) -> tuple[int, int]:
    """Return the last index whose cost is within a limit, or the first, and its cost.

    Costs are mostly affine in the index: a straight line between the two bounds names the answer,
    and its neighbour confirms it. Every third probe halves what is left, whatever the costs are.
    """
    low, low_cost = 0, cost(0)
    if low_cost > limit or count == 1:
        return low, low_cost
    high, high_cost = count - 1, cost(count - 1)
    if high_cost <= limit:
        return high, high_cost
    within = True  # whether the last probe was
    for probe in itertools.cycle(("line", "neighbour", "half")):
        if high - low == 1:
            break
        if probe == "line":
            guess = low + (high - low) * (limit - low_cost) // (high_cost - low_cost)
            index = min(max(guess, low + 1), high - 1)
        elif probe == "neighbour":
            index = low + 1 if within else high - 1
        else:
            index = (low + high) // 2
        found = cost(index)
        within = found <= limit
        if within:
            low, low_cost = index, found
        else:
            high, high_cost = index, found
    return low, low_cost
