"""Find what would wait for the device, on a machine that has none.

On the ``meta`` device no number exists: whatever reads one raises by itself, and what remains to be
seen is a copy from the host that waits. On a CPU everything may be read, so reading is noted.
"""

import traceback
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import rankflow
from rankflow import fairstart
from rankflow.adapters import row_norms
from rankflow.importance import bad_steps
from rankflow.importance.sketch import GradientSketch

_PACKAGE, _TORCH = (str(Path(package.__file__).parent) for package in (rankflow, torch))
_LOOKED_AT = (_PACKAGE, str(Path(__file__).parent))
_READS = {
    Tensor.item,
    Tensor.tolist,
    Tensor.cpu,
    Tensor.numpy,
    Tensor.__array__,
    Tensor.__bool__,
    Tensor.__int__,
    Tensor.__float__,
    Tensor.__index__,
    Tensor.__contains__,
    Tensor.nonzero,
    torch.nonzero,
    torch.equal,
    Tensor.equal,
    torch.allclose,
    torch.unique,
}
_FROM_HOST = {torch.tensor, torch.as_tensor, Tensor.new_tensor}
_OPERATIONS = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
}


def place():
    """The line of the package, or of a test's loop, that reads; "" where others do."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename == __file__ or frame.filename.startswith(_TORCH):
            continue
        is_ours = frame.filename.startswith(_LOOKED_AT)
        return f"{Path(frame.filename).name}:{frame.lineno}" if is_ours else ""
    return ""


class _Functions(TorchFunctionMode):
    def __init__(self, notes, device):
        super().__init__()
        self.notes, self.device = notes, device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _READS and args[0].device.type == self.device:
            self.notes.append(f"{func.__name__} at {place()}")
        result = func(*args, **kwargs)
        if self.device != "cpu" and func in _FROM_HOST and result.device.type == self.device:
            data = args[1] if func is Tensor.new_tensor else args[0]
            if not isinstance(data, Tensor) or data.device.type != self.device:
                self.notes.append(f"{func.__name__} at {place()}")
        return result


class _Operations(TorchDispatchMode):
    def __init__(self, notes, device):
        super().__init__()
        self.notes, self.device = notes, device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        result = func(*args, **kwargs)
        if self._waits(name, args, kwargs, result):
            self.notes.append(f"{name} at {place()}")
        return result

    def _waits(self, name, args, kwargs, result):
        if name in _OPERATIONS:
            return args[0].device.type == self.device
        if name in ("index", "index_put_"):  # by a mask, whose number of entries is not known
            return any(i is not None and i.dtype == torch.bool for i in args[1])
        if self.device == "cpu":  # all else is a copy
            return False
        if name == "_to_copy":
            source, waits = args[0], not kwargs.get("non_blocking", False)
        elif name == "copy_":
            source, waits = args[1], not (len(args) > 2 and args[2])
        else:
            return False
        return waits and {source.device.type, result.device.type} == {"cpu", self.device}


class Waits:
    """Notes the places of the package where the host would wait for the device.

    Args:
        device: Its kind; on ``cpu`` a copy cannot be told from one within the host.
    """

    def __init__(self, device):
        notes = []
        self._notes = notes
        self._modes = (_Functions(notes, device), _Operations(notes, device))

    @property
    def places(self):
        return [note for note in self._notes if not note.endswith(" at ")]

    def __enter__(self):
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class MadeUp(TorchFunctionMode):
    """Makes up what is read of the ``meta`` device: an event may wait for what it decides by."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        targets = [getattr(a, "device", a) for a in (*args[1:], *kwargs.values())]
        is_copy = func is Tensor.to and "cpu" in map(str, targets)
        if (func in _READS or is_copy) and args[0].is_meta:
            like = args[0]
            args = (_make_up(like, func), *args[1:])
        return func(*args, **kwargs)


def _make_up(like, func):
    if like.is_floating_point():
        return torch.rand(like.shape, dtype=like.dtype)
    if like.dtype == torch.bool:  # all is finite, and there is nothing to refuse
        return torch.full(like.shape, func is not Tensor.__bool__)
    return torch.arange(like.numel(), dtype=like.dtype).view(like.shape)  # nothing moved


class _NeverThere:
    """In the place of a number on its way from the device, for which nobody waits."""

    def __init__(self, number):
        pass

    def is_there(self):
        return False


@pytest.fixture
def waits(monkeypatch):
    """Make a context that notes where the host would wait for a device of that kind."""
    monkeypatch.setattr(bad_steps, "_Arrival", _NeverThere)
    return Waits


@pytest.fixture
def as_on_a_device(monkeypatch):
    """Let a CPU do what it does otherwise than a device, since it has nothing to wait for."""
    monkeypatch.setattr(fairstart, "_count", lambda step: step)
    monkeypatch.setattr(
        row_norms,
        "_expanded_squares",
        lambda weight, A, B, scale, squares: row_norms._sum_of_squares(weight, A, B, scale, 0),
    )


@pytest.fixture
def made_up(monkeypatch):
    """Make a context in which numbers of the ``meta`` device are made up."""
    measured = GradientSketch.energy

    def energy(sketch, live=None):  # there, a linear solver has no form without numbers
        home = sketch._sites[0].A
        return home.new_ones(len(sketch._sites)) if home.is_meta else measured(sketch, live)

    monkeypatch.setattr(GradientSketch, "energy", energy)
    return MadeUp
