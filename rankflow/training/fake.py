"""Run a model that has shapes and types but no numbers.

torch's fake tensors carry shape, type, device and storage through any code and take no memory, so
that a training step of a model that fits no machine at hand can be followed, whatever its
architecture. Code that asks such a tensor for a number gets an answer that does no harm, since an
engine reads scores, an optimizer its steps, and a Trainer whether a loss is finite. Code whose
shapes depend on numbers cannot be followed, such as a mixture that sends tokens to experts by
index.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, UnsupportedFakeTensorException
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rankflow.errors import RankFlowError


class NeedsNumbersError(RankFlowError):
    """Code asked fake tensors for what they do not have."""


@contextmanager
def fake_tensors(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Let a model of the meta device run as if it lay on another, without memory or numbers.

    Args:
        model: The model; it is of no use afterwards.
        device: Where it seems to lie.

    Raises:
        NeedsNumbersError: What is run inside cannot go without numbers.
    """
    try:
        with (
            _quiet_torch(),
            FakeTensorMode(allow_non_fake_inputs=True),
            _Scalars(),
            _Arrays(),
        ):
            _place(model, device)
            yield
    except (RuntimeError, NotImplementedError, UnsupportedFakeTensorException) as error:
        reason = str(error).partition("\n")[0]
        raise NeedsNumbersError(f"this model cannot run without numbers ({reason})") from error


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """Hide what torch says of addresses, and logs of what cannot be followed."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            yield
    finally:
        log.disabled = was_disabled


def _place(model: nn.Module, device: torch.device) -> None:
    """Put fake tensors in the place of a model's own, shared ones once."""
    fakes: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    if tensor not in fakes:
                        fakes[tensor] = _fake(tensor, device)
                    tensors[name] = fakes[tensor]  # type: ignore[assignment]
    # torch cannot convert a module of fake tensors, and there is nothing to convert.
    model.to = lambda *_, **__: model  # type: ignore[method-assign]


def _fake(tensor: Tensor, device: torch.device) -> Tensor:
    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake


class _Scalars(TorchDispatchMode):
    """Answers no to ``if tensor:``, and to ``item()`` 0, or 1.0: an optimizer divides by it."""

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, or answer."""
        if operation is torch.ops.aten._local_scalar_dense.default:
            kind = args[0].dtype
            return False if kind == torch.bool else 1.0 if kind.is_floating_point else 0
        return operation(*args, **(kwargs or {}))


class _Arrays(TorchFunctionMode):
    """Answers zeros to ``numpy()``."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run a function, or answer."""
        if function is Tensor.numpy:
            return np.zeros(tuple(args[0].shape), str(args[0].dtype).removeprefix("torch."))
        return function(*args, **(kwargs or {}))
