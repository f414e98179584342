r"""The norm of each output row of ``W + s B A`` from one reading of W.

.. math:: n_j^2 = \lVert W_j \rVert^2 + 2 s \sum_k B_{jk} (W A^\top)_{jk}
    + s^2 (B G B^\top)_{jj}, \qquad G = A A^\top

*Bytes.* Nothing of W's size is written. Per element of a bfloat16 W the kernels move 2 bytes. The
torch code for a GPU moves 34 (a copy to float32, the sum, its square, their sum), and PEFT 42 (an
identity matrix, the dense ``B A``, a copy of W, the multiple by s, the sum, its norm).

*Split.* Programs that only own rows would be too few to fill a GPU, and with few rows each they
would read A from the cache more often than W from memory. So the columns are split too, and so is
the rank, whose blocks run side by side and find W's tile in the cache. A program leaves three
numbers for each row: the cross term is linear in ``W A^T``, so its product with B needs no whole
sum over columns. A second kernel adds these up in a fixed order.

*Cancellation.* Where the square is below a share of its terms, the second kernel goes over the rows
again and sums the squares of ``W + s B A`` itself. It decides so on the device; nobody waits.

*Precision.* All sums are in float32. Tensor cores multiply bfloat16 exactly, so next to a bfloat16
W a finer A is two terms of 8 bits. Its error, 2^-18, is random and averages out over the columns.
float32, and float16 under a finer A, whose remainder would fall below float16's range, multiply as
float32 (see `dot_precision`). G is torch's, as precise as its products of float32 are set to be.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankflow.adapters.kernels.launch import ceil_div, on_device, power_of_two
from rankflow.adapters.kernels.tiles import TINY, dot, dot_precision, sum_of_parts

_PROGRAMS = 512  # about two for each multiprocessor of the largest GPUs
_SHARED_BYTES = 96 * 2**10  # what a program can have on all GPUs since Ampere
_FINISH = {"ROWS": 32, "COLUMNS": 32}


@dataclass(frozen=True)
class NormBlocks:
    """How the first kernel splits its work.

    Attributes:
        rows: Output rows of a program.
        columns: Columns of W that a program reads at a time.
        ranks: Components of a program.
        width: Columns of W that a program reads in all.
        warps: Warps of a program.
        stages: Tiles that are loaded ahead.
    """

    rows: int
    columns: int
    ranks: int
    width: int
    warps: int
    stages: int


def norm_blocks(out: int, columns: int, rank: int, *, itemsize: int, terms: int) -> NormBlocks:
    """Choose blocks from shapes alone, the same on all devices.

    Args:
        out: Output features.
        columns: Input features.
        rank: Components.
        itemsize: Bytes of an entry in a product.
        terms: Terms that A is split into.

    >>> norm_blocks(4096, 4096, 32, itemsize=2, terms=2)
    NormBlocks(rows=64, columns=64, ranks=32, width=512, warps=4, stages=4)
    >>> norm_blocks(4096, 14336, 384, itemsize=2, terms=2)
    NormBlocks(rows=128, columns=64, ranks=128, width=2880, warps=8, stages=2)
    >>> norm_blocks(5, 7, 0, itemsize=4, terms=1)
    NormBlocks(rows=64, columns=32, ranks=16, width=32, warps=4, stages=4)
    """
    ranks = power_of_two(rank, 16, 256 // itemsize)
    rows, warps = (128, 8) if ranks == 128 else (64, 4)
    step = 128 // itemsize
    programs = ceil_div(out, rows) * max(1, ceil_div(rank, ranks))
    splits = max(1, min(_PROGRAMS // programs, columns // (4 * step)))
    width = max(1, ceil_div(ceil_div(columns, splits), step)) * step
    stage = step * (rows + terms * ranks) * itemsize
    return NormBlocks(rows, step, ranks, width, warps, min(4, max(2, _SHARED_BYTES // stage)))


@torch.library.custom_op("rankflow::row_norms", mutates_args=())
def row_norms(
    weight: Tensor, A: Tensor, B: Tensor, scale: float, axis: int, cancelled: float
) -> Tensor:
    """Return the norm of each output row of ``W + s B A``, in float32, shape ``(out,)``, never 0.

    Args:
        weight: W, ``(out, in)`` for ``axis`` 0 and ``(in, out)`` for 1, in any layout.
        A: Right factor, ``(rank, in)``.
        B: Left factor, ``(out, rank)``.
        scale: s.
        axis: Axis of the weight that runs over output features.
        cancelled: Rows whose square is below this share of its terms are summed anew.
    """
    (out, columns), strides = _oriented(weight, axis)
    rank = len(A)
    norms = B.new_empty(out, dtype=torch.float32)
    if out == 0:
        return norms
    A, B = A.contiguous(), B.contiguous()
    wide = A.float()
    G = wide @ wide.T
    first, second = _terms_of(A, weight.dtype)
    blocks = norm_blocks(
        out, columns, rank, itemsize=first.element_size(), terms=1 + (second is not first)
    )
    parts = max(1, ceil_div(rank, blocks.ranks))
    splits = max(1, ceil_div(columns, blocks.width))
    squares = norms.new_empty(splits, out)
    crosses, owns = norms.new_empty(2, splits * parts, out)
    shape = (out, columns, rank, *strides)
    with on_device(weight):
        _partial_terms[(parts, ceil_div(out, blocks.rows), splits)](
            *(weight, first, second, B, G, squares, crosses, owns, *shape, blocks.width),
            TWO_TERMS=second is not first,
            PRECISION=dot_precision(weight),
            ROWS=blocks.rows,
            COLUMNS=blocks.columns,
            RANKS=blocks.ranks,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
        _finish[(ceil_div(out, _FINISH["ROWS"]),)](
            *(weight, A, B, squares, crosses, owns, norms, *shape, splits, splits * parts),
            *(scale, cancelled),
            **_FINISH,
            num_warps=4,
            num_stages=2,
        )
    return norms


@row_norms.register_fake
def _(weight: Tensor, A: Tensor, B: Tensor, scale: float, axis: int, cancelled: float) -> Tensor:
    return B.new_empty(weight.shape[axis], dtype=torch.float32)


def _oriented(weight: Tensor, axis: int) -> tuple[torch.Size, tuple[int, ...]]:
    """Return shape and strides of W as ``(out, in)``."""
    rows = weight if axis == 0 else weight.T
    return rows.shape, rows.stride()


def _terms_of(A: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return A as the sum of two terms that multiply W nearly exactly, or twice the only one."""
    if A.dtype == dtype:
        return A, A
    wide = A.float()
    if dtype != torch.bfloat16:
        return wide, wide
    first = wide.bfloat16()
    return first, (wide - first).bfloat16()


@triton.jit(do_not_specialize=["rank"])
def _partial_terms(
    W: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    B: tl.tensor,
    G: tl.tensor,
    squares: tl.tensor,
    crosses: tl.tensor,
    owns: tl.tensor,
    out: tl.tensor,
    columns: tl.tensor,
    rank: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    width: tl.tensor,
    TWO_TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
) -> None:
    """Write sums of ``W^2`` and of ``B * (W A^T)`` over some columns, for some rows and ranks.

    And a share of ``B * (B G)``, whose inner rank is dealt out among the programs of all columns.
    """
    part, split = tl.program_id(0), tl.program_id(2)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    ks = part * RANKS + tl.arange(0, RANKS)
    steps = tl.arange(0, COLUMNS)
    rows_there, ks_there = rows < out, ks < rank
    W_tile = W + rows.to(tl.int64)[:, None] * row_stride + steps[None, :] * column_stride
    A_tile = ks.to(tl.int64)[None, :] * columns + steps[:, None]
    mixed = tl.zeros((ROWS, RANKS), tl.float32)
    square = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(split * width, min(split * width + width, columns), COLUMNS):
        there = start + steps < columns
        offset = tl.cast(start, tl.int64)
        w = tl.load(W_tile + offset * column_stride, rows_there[:, None] & there[None, :], 0.0)
        mask = there[:, None] & ks_there[None, :]
        a = tl.load(first + A_tile + offset, mask, 0.0)
        mixed = dot(w.to(a.dtype), a, mixed, PRECISION)
        if TWO_TERMS:
            a = tl.load(second + A_tile + offset, mask, 0.0)
            mixed = dot(w, a, mixed, PRECISION)
        wide = w.to(tl.float32)
        square += wide * wide
    B_rows = B + rows.to(tl.int64)[:, None] * rank
    b = tl.load(B_rows + ks[None, :], rows_there[:, None] & ks_there[None, :], 0.0).to(tl.float32)
    place = (split * tl.num_programs(0) + part).to(tl.int64) * out + rows
    tl.store(crosses + place, tl.sum(b * mixed, 1), rows_there)
    mask = rows_there & (part == 0)
    tl.store(squares + split.to(tl.int64) * out + rows, tl.sum(square, 1), mask)
    image = tl.zeros((ROWS, RANKS), tl.float32)  # of B under G
    for start in range(split * 16, rank, tl.num_programs(2) * 16):
        ls = start + tl.arange(0, 16)
        few = tl.load(B_rows + ls[None, :], rows_there[:, None] & (ls < rank)[None, :], 0.0)
        g_mask = (ls < rank)[:, None] & ks_there[None, :]
        g = tl.load(G + ls[:, None] * rank + ks[None, :], g_mask, 0.0)
        image = dot(few.to(tl.float32), g, image, PRECISION)
    tl.store(owns + place, tl.sum(b * image, 1), rows_there)


@triton.jit(do_not_specialize=["rank", "splits", "pieces"])
def _finish(
    W: tl.tensor,
    A: tl.tensor,
    B: tl.tensor,
    squares: tl.tensor,
    crosses: tl.tensor,
    owns: tl.tensor,
    norms: tl.tensor,
    out: tl.tensor,
    columns: tl.tensor,
    rank: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    splits: tl.tensor,
    pieces: tl.tensor,
    scale: tl.tensor,
    cancelled: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Add the partial sums, and take rows again whose terms cancel."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = rows < out
    square = sum_of_parts(squares, splits, rows, out)
    cross = 2 * scale * sum_of_parts(crosses, pieces, rows, out)
    own = scale * scale * sum_of_parts(owns, pieces, rows, out)
    total = square + cross + own
    doubtful = total < cancelled * (square + own)
    if tl.max(doubtful.to(tl.int32), 0) > 0:
        W_rows = W + rows.to(tl.int64)[:, None] * row_stride
        B_rows = B + rows.to(tl.int64)[:, None] * rank
        exact = _sum_of_squares(
            W_rows, B_rows, there, A, columns, rank, column_stride, scale, ROWS, COLUMNS
        )
        total = tl.where(doubtful, exact, total)
    norm = tl.sqrt_rn(total)
    tl.store(norms + rows, tl.where(norm < TINY, TINY, norm), there)  # NaN shall be seen


@triton.jit
def _sum_of_squares(
    W_rows: tl.tensor,
    B_rows: tl.tensor,
    there: tl.tensor,
    A: tl.tensor,
    columns: tl.tensor,
    rank: tl.tensor,
    column_stride: tl.tensor,
    scale: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Return the sums of squares of some rows of ``W + s B A``, tile by tile, in full float32."""
    steps, few = tl.arange(0, COLUMNS), tl.arange(0, 16)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, columns, COLUMNS):
        cs = tl.cast(start, tl.int64) + steps
        update = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, rank, 16):
            ks = k + few
            b = tl.load(B_rows + ks[None, :], there[:, None] & (ks < rank)[None, :], 0.0)
            a_mask = (ks < rank)[:, None] & (cs < columns)[None, :]
            a = tl.load(A + ks.to(tl.int64)[:, None] * columns + cs[None, :], a_mask, 0.0)
            update = tl.dot(b.to(tl.float32), a.to(tl.float32), update, input_precision="ieee")
        w_mask = there[:, None] & (cs < columns)[None, :]
        w = tl.load(W_rows + cs[None, :] * column_stride, w_mask, 0.0)
        entries = w.to(tl.float32) + scale * update
        total += entries * entries
    return tl.sum(total, 1)
