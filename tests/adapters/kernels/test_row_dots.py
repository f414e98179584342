"""The kernel of the gate gradients compiles for GPUs that are not here."""

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from rankflow.adapters.kernels.row_dots import _dot_rows  # noqa: E402

if not isinstance(_dot_rows, triton.JITFunction):
    pytest.skip("the interpreter takes the compiler's place", allow_module_level=True)

TARGETS = {
    "A100": GPUTarget("cuda", 80, 32),
    "H100": GPUTarget("cuda", 90, 32),
    "MI300": GPUTarget("hip", "gfx942", 64),
}


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("kind", [tl.float32, tl.bfloat16, tl.float16], ids=str)
@pytest.mark.parametrize("gpu", TARGETS)
def test_it_compiles(gpu, kind, subtracts, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {
        "TYPE": kind,
        "SUBTRACTED": tl.float32,
        "SUBTRACTS": subtracts,
        "TINY": torch.finfo(torch.float32).tiny,
        "BLOCK": 4096,
    }
    signature = {"rows": "*i64", "addresses": "*i64", "dots": "*fp32", "tensors": "i32"}
    signature |= dict.fromkeys(constants, "constexpr")
    fixed = {(_dot_rows.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(_dot_rows, signature, fixed, {})
    compiled = triton.compile(source, target=TARGETS[gpu], options={"num_warps": 4})
    assert compiled.metadata.shared <= 64 * 2**10
