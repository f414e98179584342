"""Each kernel's tests run twice: in Triton's interpreter, and on a GPU where there is one."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.interpreter),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """Where the kernels run."""
    pytest.importorskip("triton")
    monkeypatch.delenv("RANKFLOW_TRITON", raising=False)
    return request.param


@pytest.fixture
def random(device):
    """Make random tensors, the same on every device."""

    def make(*shape, dtype=torch.float32):
        return torch.randn(*shape).to(device, dtype)

    return make


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(operator.name())
        return operator(*args, **(kwargs or {}))


@pytest.fixture
def kernels_in():
    """Run something and name the kernels of ours that it used."""

    def record(compute):
        with _Operators() as seen:
            compute()
        return {name.removeprefix("rankflow::") for name in seen.names if "rankflow::" in name}

    return record
