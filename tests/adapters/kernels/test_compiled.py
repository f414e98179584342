"""The kernels compile for GPUs that are not here, in what memory those have."""

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from rankflow.adapters.kernels import compose, norm  # noqa: E402

KERNELS = [
    (norm, "_partial_terms"),
    (norm, "_finish"),
    (compose, "_mix"),
    (compose, "_partial_gradients"),
    (compose, "_finish"),
]
# What a program may have of a multiprocessor's own memory, in KiB.
GPUS = {
    "RTX 3090": (GPUTarget("cuda", 86, 32), 99),
    "H100": (GPUTarget("cuda", 90, 32), 227),
    "MI300": (GPUTarget("hip", "gfx942", 64), 64),
}
OPTIONS = ("num_warps", "num_stages")


class Launches:
    """Takes launches instead of a GPU."""

    def __init__(self, kernel, taken):
        self.kernel, self.taken = kernel, taken

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.taken.append(
            (self.kernel, arguments, constants)
        )


@pytest.fixture
def launches(monkeypatch):
    """A list of everything that is launched, which leaves its results as they are."""
    if not isinstance(norm._finish, triton.JITFunction):
        pytest.skip("the interpreter takes the compiler's place")
    taken = []
    for module, name in KERNELS:
        monkeypatch.setattr(module, name, Launches(getattr(module, name), taken))
    return taken


def source_of(kernel, arguments, constants):
    """What Triton compiles for a launch, specialised as it does."""
    signature, fixed, attributes = {}, {}, {}
    names = kernel.arg_names
    values = dict(zip(names, arguments, strict=False)) | constants
    for place, name in enumerate(names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            kind = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
            signature[name] = f"*{kind[value.dtype]}"
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif name in constants or value is None or (value == 1 and isinstance(value, int)):
            signature[name], fixed[(place,)] = "constexpr", value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0 and name not in kernel.do_not_specialize:
                attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, fixed, attributes)


@pytest.mark.parametrize(
    ("gpu", "dtype", "rank"),
    [
        ("H100", torch.bfloat16, 32),
        ("RTX 3090", torch.bfloat16, 384),
        ("RTX 3090", torch.float32, 64),
        ("MI300", torch.bfloat16, 384),
        ("MI300", torch.float32, 64),
    ],
)
def test_every_kernel_compiles_and_fits(gpu, dtype, rank, launches, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    target, limit = GPUS[gpu]
    precision = "ieee" if target.backend == "hip" else "tf32x3"
    for module in (norm, compose):
        monkeypatch.setattr(module, "dot_precision", lambda tensor: precision)
    base, W = torch.zeros(4096, 512, dtype=dtype), torch.zeros(512, 1024, dtype=dtype)
    A, B, row = torch.zeros(rank, 1024), torch.zeros(512, rank), torch.ones(512)
    hidden, bias = torch.zeros(rank, 4096, dtype=dtype), row.to(dtype)
    norm.row_norms(W, A, B, 0.5, 0, 1e-2)
    compose.mix(base, hidden, B, row, bias, 0.5)
    compose.mix_gradients(base, base, hidden, B, row, row, bias, 0.5, True, True)
    assert len(launches) == len(KERNELS)
    for kernel, arguments, settings in launches:
        options = {name: settings[name] for name in OPTIONS if name in settings}
        constants = {name: value for name, value in settings.items() if name not in OPTIONS}
        compiled = triton.compile(
            source_of(kernel, arguments, constants), target=target, options=options
        )
        assert compiled.metadata.shared <= limit * 2**10, kernel.__name__
