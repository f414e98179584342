"""Each kernel's tests run twice: in Triton's interpreter, and on a GPU where there is one."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.interpreter),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
# As triton.backends.compiler.GPUTarget takes them.
GPUS = {"A100": ("cuda", 80, 32), "H100": ("cuda", 90, 32), "MI300": ("hip", "gfx942", 64)}


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


@pytest.fixture(params=GPUS)
def absent_gpu(request):
    """The name of a GPU that need not be here."""
    return request.param


@pytest.fixture
def compile_for(monkeypatch, tmp_path):
    """Compile a kernel for a GPU, given the types of its arguments and its constants."""
    triton = pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def compile_kernel(gpu, kernel, signature, constants):
        if not isinstance(kernel, triton.JITFunction):
            pytest.skip("the interpreter takes the compiler's place")
        kinds = signature | dict.fromkeys(constants, "constexpr")
        fixed = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = triton.compiler.ASTSource(kernel, kinds, fixed, {})
        target = triton.backends.compiler.GPUTarget(*GPUS[gpu])
        return triton.compile(source, target=target, options={"num_warps": 4})

    return compile_kernel
