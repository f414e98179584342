"""What a change may touch, as it is now, to be put back if the change does not succeed.

Objects are saved by their attributes, and of dicts, lists and sets among these the content too, so
that a hook which was removed, or a parameter in an optimizer's group, is back in its place. Nothing
on the device is copied: whoever changes something below a savepoint puts new tensors in the place
of the old and writes into none (see ``renew``).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer

from rankflow.adapters.sites import Site
from rankflow.adapters.way_back import WayBack
from rankflow.errors import SurgeryError, brief

_Container = dict[Any, Any] | list[Any] | set[Any]


class Savepoint:
    """Sites, an optimizer and other objects as they are.

    Args:
        sites: Sites of a model.
        model: The model, if the description of its adapters may change too.
        optimizer: The optimizer that trains them, or None.
        others: Objects that keep state in attributes.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        model: PeftModel | None = None,
        optimizer: Optimizer | None = None,
        others: Iterable[object] = (),
    ) -> None:
        modules = [module for site in sites for module in _modules_of(site.layer)]
        owners = [*modules, *others, *([] if optimizer is None else [optimizer])]
        self._owners = [(owner, dict(vars(owner))) for owner in owners]
        containers = [
            value
            for _, attributes in self._owners
            for value in attributes.values()
            if isinstance(value, dict | list | set)
        ]
        if model is not None:
            containers.append(model.peft_config)
        if optimizer is not None:
            containers += [group["params"] for group in optimizer.param_groups]
        parameters = [p for site in sites for p in _parameters_of(site)]
        # Most are empty, and of modules there are many.
        self._contents = [(c, c.copy() if c else ()) for c in containers]
        self._data = {p: p.data for p in parameters}
        self._parameters = [
            (p, p.grad, p.requires_grad, dict(p._post_accumulate_grad_hooks or {}))
            for p in parameters
        ]
        self._log: list[tuple[Tensor, WayBack | None]] = []  # None: it was made since

    def made(self, tensor: Tensor) -> None:
        """Note a new tensor, so that its memory is free again on the way back."""
        self._log.append((tensor, None))

    def let_go(self, tensor: Tensor, way_back: WayBack) -> None:
        """Free the memory of a tensor that nothing computes with any more, wherever it is held.

        The object stays and is empty, also in a graph of before, which can no more be used. Of a
        parameter the gradient goes too, as soon as the change is over.

        Args:
            tensor: A parameter, or a tensor of an optimizer's or another state.
            way_back: Tells what it held.
        """
        self._log.append((tensor, way_back))
        self._data.pop(tensor, None)  # type: ignore[call-overload]
        tensor.grad = None
        tensor.data = tensor.new_empty(0)

    def restore(self) -> None:
        """Put everything back.

        What was made and let go is undone step by step, the last first, so no more memory is needed
        than the change itself had taken, but for the removed part of one tensor. If that is
        interrupted in turn, the rest has not been put back, and another call goes on from there.
        """
        while self._log:
            tensor, way_back = self._log[-1]
            tensor.data = tensor.new_empty(0) if way_back is None else way_back.rebuild()
            self._log.pop()
        for owner, attributes in self._owners:
            vars(owner).clear()
            vars(owner).update(attributes)
        for container, content in self._contents:
            _refill(container, content)
        for parameter, data in self._data.items():
            parameter.data = data
        for parameter, gradient, requires_grad, hooks in self._parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
            if parameter._post_accumulate_grad_hooks is not None:
                _refill(parameter._post_accumulate_grad_hooks, hooks)


@contextmanager
def undone_on_error(
    what: str,
    sites: Sequence[Site],
    *,
    model: PeftModel | None = None,
    optimizer: Optimizer | None = None,
    others: Iterable[object] = (),
) -> Iterator[Savepoint]:
    """Put all of a savepoint back if the block does not come to its end, whatever interrupts it.

    Args:
        what: What the block does, as the subject of a sentence.
        sites: As in ``Savepoint``.
        model: As in ``Savepoint``.
        optimizer: As in ``Savepoint``.
        others: As in ``Savepoint``.

    Raises:
        SurgeryError: The block raised an error of the machine, such as a lack of memory; all else
            that it may raise passes as it is.
    """
    before = Savepoint(sites, model=model, optimizer=optimizer, others=others)
    try:
        yield before
    except BaseException as error:
        before.restore()
        if isinstance(error, RuntimeError | MemoryError):
            raise undone(what, error) from error
        raise


def renew(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter other values in new memory, so that what it held can be put back.

    Args:
        parameter: The parameter; it stays the same object.
        value: Its values, of a shape that spreads to the parameter's.
    """
    parameter.data = torch.empty_like(parameter).copy_(value.detach())


def undone(what: str, error: Exception) -> SurgeryError:
    """Return the error of a change that was undone because it could not be carried out.

    Args:
        what: The change, as the subject of a sentence.
        error: What came in between, most often a lack of memory.
    """
    return SurgeryError(
        f"{what} failed, and everything is as it was before it: {type(error).__name__}: "
        f"{brief(error)}; if memory is short, take a smaller batch or budget, or free what "
        "else is on the device"
    )


def _modules_of(layer: nn.Module) -> Iterator[nn.Module]:
    yield layer
    for name, child in layer.named_children():
        if name != "base_layer" and any(True for _ in child.parameters()):
            yield from child.modules()


def _parameters_of(site: Site) -> list[nn.Parameter]:
    row_gate = site.row_gate
    return [*site.named_parameters.values(), *([] if row_gate is None else [row_gate])]


def _refill(container: _Container, content: _Container | tuple[()]) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)
