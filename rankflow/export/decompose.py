r"""An adapted weight as a sum of orthogonal rank-1 components, and what leaving some out costs.

**LoRA.** The change :math:`s B A = \sum_k \sigma_k u_k v_k^\top` comes from the SVD of two small
matrices (the R factors of B and of :math:`A^\top`), never from the product. Leaving out a set D of
components costs :math:`\sum_{k \in D} \sigma_k^2`, and no adapter of the rank that is left does
better than the greatest ones (Eckart and Young 1936).

**DoRA.** The weight is :math:`c_j V_j` row by row, with :math:`V = W + s B A` and
:math:`c = m / n, n_j = \lVert V_j \rVert`, so a component reaches the model times c. The components
are therefore those of the SVD of :math:`\operatorname{diag}(c)\, s B A`. Without some of them the
rows are :math:`V'_j`, and the magnitude that brings them nearest to what they were is

.. math:: m'_j = m_j \cos(V_j, V'_j), \qquad
    \lVert c_j V_j - \tfrac{m'_j}{n'_j} V'_j \rVert^2 = m_j^2 \sin^2(V_j, V'_j)
    = \lVert E_j \rVert^2 - \Bigl(\frac{\langle E_j, V'_j \rangle}{n'_j}\Bigr)^2,

with :math:`E_j = c_j (V_j - V'_j)`, whose squares sum up to :math:`\sum_{k \in D} \sigma_k^2`. So
the energies bound the error from above, and it falls below them by what a row's new length can make
good. Keeping :math:`m` would let the scale c of all that stays move with the norm.

**DoRA without its magnitude.** The change :math:`\operatorname{diag}(c - 1) W +
\operatorname{diag}(c)\, s B A` is of full rank; its greatest components take the place of the
update, and what is beyond them is lost. They are dense, and there may be as many as the weight has
rows: they alone are kept in the adapter's own type.

All arithmetic is float64: what is left out is a difference of what is there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rankflow.adapters.base_weight import magnitude_factor
from rankflow.adapters.row_norms import row_norms_of_sum
from rankflow.adapters.sites import Site
from rankflow.errors import ExportError
from rankflow.records import FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class AdaptedMatrix:
    """One site as matrices, wherever it comes from.

    Attributes:
        name: The site's name.
        A: Right factor, shape ``(rank, in)``.
        B: Left factor, shape ``(out, rank)``.
        scale: Factor of ``B A``.
        magnitude: DoRA's magnitude, shape ``(out,)``; None for LoRA.
    """

    name: str
    A: Tensor
    B: Tensor
    scale: float
    magnitude: Tensor | None

    @classmethod
    def of(cls, site: Site) -> "AdaptedMatrix":
        """See a live site so; a gate is folded into B."""
        A, B = site.A.flatten(1), site.effective_B.flatten(1)
        return cls(site.name, A, B, site.scale, site.magnitude)


@dataclass(frozen=True, slots=True)
class _Rows:
    r"""What the norms of a DoRA site's rows depend on.

    Attributes:
        magnitude: m, shape ``(out,)``.
        factor: c = m / n, shape ``(out,)``.
        squares: Squared norm of each row of W, shape ``(out,)``.
        own: Entries :math:`q_{jk}` of the components before c, shape ``(out, k)``: component k
            adds :math:`q_{jk} v_k` to row j of V.
        along: Their products with the row, :math:`q_{jk} \langle v_k, W_j \\rangle`, of that shape.
    """

    magnitude: Tensor
    factor: Tensor
    squares: Tensor
    own: Tensor
    along: Tensor


@dataclass(frozen=True, slots=True)
class Decomposition:
    """A site as orthogonal components, the greatest first, without any that is zero.

    Attributes:
        A: Rows of the components, shape ``(k, in)``.
        B: Their columns, shape ``(out, k)``; all of them give the site's update, and of one
            component both are equally long (times c, for DoRA).
        energies: Squared norm of each component in the effective weight, shape ``(k,)``.
        change: Squared norm of the effective weight's whole change.
        beyond: Of that, what no choice of components can reach.
        rows: For a site that keeps a magnitude.
    """

    A: Tensor
    B: Tensor
    energies: FloatArray
    change: float
    beyond: float
    rows: _Rows | None


def decompose(
    matrix: AdaptedMatrix, weight: Tensor | None, *, most: int | None = None
) -> Decomposition:
    """Take a site apart.

    Args:
        matrix: The site.
        weight: The base weight, shape ``(out, in)``; None for LoRA, which does not need it.
        most: Fold DoRA's magnitude into the components, at most so many; None keeps it. LoRA has
            no magnitude, and all of its components are given.

    Raises:
        ExportError: The site holds a number that is not finite, or the weight is another one's.
    """
    _check(matrix, weight)
    A, B = (t.detach().to("cpu", torch.float64) for t in (matrix.A, matrix.B))
    if matrix.magnitude is None:
        parts = _orthogonalise(A, B, B, matrix.scale)
        change = float(parts.energies.sum())
        return Decomposition(parts.A, parts.B, parts.energies, change, 0.0, None)
    assert weight is not None, "a magnitude is divided by the norms of the base weight's rows"
    W = weight.detach().to("cpu", torch.float64)
    magnitude = matrix.magnitude.detach().flatten().to("cpu", torch.float64)
    factor = magnitude_factor(magnitude, row_norms_of_sum(W, A, B, matrix.scale))
    weighted = factor.unsqueeze(1) * B
    if most is not None:
        whole = (factor - 1).unsqueeze(1) * W + matrix.scale * (weighted @ A)
        return _fold(whole, matrix, most)
    parts = _orthogonalise(A, B, weighted, matrix.scale)
    lengths = parts.A.norm(dim=1)  # (k,)
    own = matrix.scale * parts.B * lengths  # (out, k)
    along = own * (W @ (parts.A / lengths.unsqueeze(1)).T)
    rows = _Rows(magnitude, factor, W.square().sum(dim=1), own, along)
    return Decomposition(parts.A, parts.B, parts.energies, _change(rows), 0.0, rows)


def squared_error(site: Decomposition, keep: IntArray) -> float:
    """Return the squared norm by which the effective weight misses what it was.

    Args:
        site: The site.
        keep: Ascending indices of the components that stay.
    """
    dropped = _dropped(site, keep)
    energy = float(site.energies[dropped.numpy()].sum())
    if site.rows is None:
        return site.beyond + energy
    rows = site.rows
    regained = rows.factor * _slope(rows, keep, dropped) * _norms_after(rows, keep).sqrt()
    return max(energy - float(regained.square().sum()), 0.0)


def magnitude_after(site: Decomposition, keep: IntArray) -> Tensor | None:
    r"""Return the magnitude :math:`m' = m \cos(V, V')`, shape ``(out,)``; None without one.

    Args:
        site: The site.
        keep: Ascending indices of the components that stay.
    """
    if site.rows is None:
        return None
    rows, dropped = site.rows, _dropped(site, keep)
    if len(dropped) == 0:
        return rows.magnitude
    return rows.factor * (1 + _slope(rows, keep, dropped)) * _norms_after(rows, keep).sqrt()


def factored_svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the SVD of B A in float64 on the CPU, without forming the product.

    Args:
        B: Shape ``(out, rank)``.
        A: Shape ``(rank, in)``.

    Returns:
        U ``(out, k)``, S ``(k,)`` descending, and V ``(in, k)`` with ``B A = U diag(S) V^T``, where
        k is the least of rank, out and in.
    """
    left = torch.linalg.qr(B.detach().to("cpu", torch.float64))
    right = torch.linalg.qr(A.detach().to("cpu", torch.float64).T)
    U, S, Vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    return left.Q @ U, S, right.Q @ Vh.T


def _check(matrix: AdaptedMatrix, weight: Tensor | None) -> None:
    tensors = [t for t in (matrix.A, matrix.B, matrix.magnitude) if t is not None]
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise ExportError(
            f"site {matrix.name!r} holds a number that is not finite: the training diverged; "
            "take an earlier checkpoint"
        )
    expected = (len(matrix.B), matrix.A.shape[1])
    if weight is not None and weight.shape != expected:
        raise ExportError(
            f"site {matrix.name!r} is of shape {expected} in the adapter and "
            f"{tuple(weight.shape)} in the base model; name its own base model"
        )


@dataclass(frozen=True, slots=True)
class _Parts:
    A: Tensor
    B: Tensor
    energies: FloatArray


def _orthogonalise(A: Tensor, B: Tensor, weighted: Tensor, scale: float) -> _Parts:
    """Split ``B A`` along the right singular vectors of ``weighted A``, which are orthonormal."""
    _, S, V = factored_svd(weighted, A)
    count = _nonzero(S, (len(B), A.shape[1])) if scale else 0
    S, V = S[:count], V[:, :count]
    roots = S.sqrt()
    energies: FloatArray = (scale * S).square().numpy()
    return _Parts((V * roots).T, B @ (A @ V) / roots, energies)


def _fold(change: Tensor, matrix: AdaptedMatrix, most: int) -> Decomposition:
    r"""Split a change C of the weight along its singular vectors, at most so many.

    For a tall C they are the eigenvectors v of :math:`C^\top C`, which takes a third of the time of
    an SVD. That the small ones are less exact costs nothing here: for any orthonormal v,
    :math:`\sum_k (C v_k) v_k^\top` is C, and leaving one out costs :math:`\lVert C v_k \rVert^2`.
    """
    is_tall = change.shape[0] >= change.shape[1]
    C = (change if is_tall else change.T).to(_place(matrix.A))
    v = torch.linalg.eigh(C.T @ C).eigenvectors  # (short, short)
    u = C @ v
    energies, order = u.square().sum(dim=0).sort(descending=True, stable=True)
    S = energies.sqrt()
    count = min(most, _nonzero(S, C.shape)) if matrix.scale else 0
    roots = (S[:count] / abs(matrix.scale)).sqrt()
    u = u[:, order[:count]] / (matrix.scale * roots)
    v = v[:, order[:count]] * roots
    left, right = (u, v) if is_tall else (v, u)
    kept = torch.promote_types(matrix.A.dtype, torch.float32)
    return Decomposition(
        right.T.contiguous().to("cpu", kept),
        left.contiguous().to("cpu", kept),
        energies[:count].cpu().numpy(),
        float(energies.sum()),
        float(energies[count:].sum()),
        None,
    )


def _place(tensor: Tensor) -> torch.device:
    """Where a dense product runs; other accelerators than CUDA lack float64."""
    return tensor.device if tensor.device.type == "cuda" else torch.device("cpu")


def _nonzero(S: Tensor, shape: tuple[int, ...] | torch.Size) -> int:
    """Count the singular values that are more than rounding."""
    if len(S) == 0:
        return 0
    rounding = S[0] * max(shape) * torch.finfo(S.dtype).eps
    return int(torch.count_nonzero(S.gt(rounding)))


def _dropped(site: Decomposition, keep: IntArray) -> Tensor:
    mask = torch.ones(len(site.energies), dtype=torch.bool)
    mask[torch.as_tensor(keep)] = False
    return mask.nonzero().flatten()


def _change(rows: _Rows) -> float:
    """Squared norm of ``diag(c - 1) W + diag(c) s B A``, without the difference of its ends."""
    stretch = rows.factor - 1
    update = rows.own.square().sum(dim=1)
    cross = 2 * stretch * rows.factor * rows.along.sum(dim=1)
    total = stretch.square() * rows.squares + cross + rows.factor.square() * update
    return max(float(total.sum()), 0.0)


def _norms_after(rows: _Rows, keep: IntArray) -> Tensor:
    """Squared norm of each row of V', shape ``(out,)``."""
    kept = torch.as_tensor(keep)
    cross = 2 * rows.along.index_select(1, kept).sum(dim=1)
    own = rows.own.index_select(1, kept).square().sum(dim=1)
    return (rows.squares + cross + own).clamp_min(0)


def _slope(rows: _Rows, keep: IntArray, dropped: Tensor) -> Tensor:
    r"""Share of V' that is nearest to what is dropped, :math:`\langle V - V', V' \rangle / n'^2`.

    What is dropped is orthogonal to what is kept, so that of V' only W meets it.
    """
    norms = _norms_after(rows, keep)
    meeting = rows.along.index_select(1, dropped).sum(dim=1)
    return torch.where(norms > 0, meeting / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0)
