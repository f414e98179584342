r"""In which directions would a new component learn? A sketch of the weight's gradient answers.

A newborn ``b a^T`` starts at ``b = 0``, where its only gradient is

.. math:: \partial L / \partial b = s\, G a, \qquad
    G = \operatorname{diag}(c) \sum_\text{tokens} \delta^\top x,

with the layer's input x and the gradient :math:`\delta` of its output. Under DoRA
:math:`c = m / n`, because the newborn adds to the direction ``V = W + s B A`` and the output is
``c * V x`` with n held constant; without a magnitude ``c = 1``. So the best rows a are the first
right-singular vectors of G, averaged over some steps, outside of what the live rows span. (An
embedding's newborns start at ``a = 0`` with b drawn, so there they are left-singular vectors.)

G has the weight's size and is never formed. With random :math:`\Omega` and :math:`\Psi` the thin
products

.. math:: Y = G \Omega, \qquad Z = \Psi^\top G

are sums over tokens, microbatches, steps and processes, and give
:math:`G \approx Q (\Psi^\top Q)^+ Z` with ``Q = orth(Y)``: exactly, up to rounding, if the rank of
G is at most the sketch's width (Tropp, Yurtsever, Udell and Cevher 2017, arXiv 1609.00048). The
factor c is put on at the end, with the weights that the newborn will meet.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from rankflow import processes
from rankflow.adapters.dora import row_factor
from rankflow.adapters.savepoint import undone
from rankflow.adapters.sites import Site
from rankflow.adapters.weight_gradient import project
from rankflow.importance.watch import watch

logger = logging.getLogger(__name__)

# Rows of Z for each column of Y. Spectra of gradients decay slowly, and with two, as for a quick
# decay (Tropp et al.), the first direction keeps 0.3 of the energy of the best one where s_i is
# i^-1/2; with four it keeps 0.7. Wider sketches gain less for the same memory.
_OVERSAMPLING = 4

# Directions whose share of a matrix in float64 is below this have lost their digits.
_RESOLVED = 1e-12

# Directions this far below the first are rounding: sums of bfloat16 products have three digits.
_NEGLIGIBLE = 1e-3


@dataclass(frozen=True, slots=True)
class _Sums:
    """The sketches of all sites on one device, in one stretch of memory.

    Attributes:
        step: Sums of the step that is under way.
        total: Sums of the accepted steps.
    """

    step: Tensor
    total: Tensor


@dataclass(frozen=True, slots=True)
class _SiteSketch:
    """Views into ``_Sums``, and the test matrices, which sites of equal size share."""

    right: Tensor  # (in, k)
    left: Tensor  # (out, l)
    step: tuple[Tensor, Tensor]  # (out, k) and (l, in)
    total: tuple[Tensor, Tensor]


class GradientSketch:
    r"""Sketches the gradient of every site's effective weight while it is open.

    A step in the open costs four thin products at each site and :math:`O((\text{in} + \text{out})
    k)` memory; closed it costs nothing. Sketches are additive: in a job of several processes that
    each average their loss, the mean over processes of all tensors of ``state`` is the sketch of
    the whole batch.

    Args:
        sites: The sites.
        width: k, the number of directions that the sketch resolves.
        seed: Seed of the test matrices, which are equal on every device and in every process.
    """

    def __init__(self, sites: Sequence[Site], *, width: int, seed: int) -> None:
        self._sites = tuple(sites)
        self._width = width
        self._seed = seed
        self._handles: list[RemovableHandle] = []
        self._warned = False
        self.close()

    @property
    def is_open(self) -> bool:
        """Whether gradients are being sketched."""
        return bool(self._handles)

    def open(self, sites: Sequence[Site], event: int = 0) -> None:
        """Sketch the gradients of these sites from now on, afresh.

        Args:
            sites: The sites.
            event: Running number of the event ahead; each has test matrices of its own.

        Raises:
            SurgeryError: There is no memory for it; the sketch stays closed.
        """
        self.close()
        self._sites = tuple(sites)
        try:
            self._allocate(event)
            self._count = torch.zeros((), device=self._sites[0].A.device)
            for index, site in enumerate(sites):
                self._handles.append(watch(site, partial(self._note, index)))
        except BaseException as error:
            self.close()
            if isinstance(error, RuntimeError | MemoryError):
                raise undone("sketching the gradient for newborns", error) from error
            raise

    def close(self) -> None:
        """Remove the hooks and forget everything."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._sums: list[_Sums] = []
        self._sketches: list[_SiteSketch] = []
        self._passes = 0

    def observe(self, accept: Tensor, loss_scale: Tensor | float) -> None:
        """Fold in the step whose backward passes are done; does not wait for the device.

        Args:
            accept: Whether the step counts, a boolean of shape ``()``.
            loss_scale: Factor that a gradient scaler put on the loss.
        """
        if not self.is_open:
            return
        self._check_passes()
        accept = accept & self._is_finite(accept.device)
        for sums in self._sums:
            home = sums.step.device
            scale = loss_scale
            if isinstance(scale, Tensor):
                scale = scale.to(home, non_blocking=True)
            here = accept.to(home, non_blocking=True)
            sums.total.add_(torch.where(here, sums.step.div_(scale), 0))
            sums.step.zero_()
        self._count += accept

    def directions(self, index: int, count: int, live: Tensor | None = None) -> Tensor:
        """Return the directions in which a newborn's gradient is largest.

        Args:
            index: Index of the site.
            count: How many at most.
            live: Rows to stay away from, shape ``(rank, width)``: the best directions of their
                complement are returned.

        Returns:
            Orthonormal rows, best first, float64 on the CPU: rows of A, ``in_features`` wide, or
            for an embedding columns of B, ``out_features`` wide. There are fewer than ``count``
            where the gradient has fewer; none while the sketch is closed or has seen nothing.
        """
        if not self.is_open:
            site = self._sites[index]
            width = site.out_features if site.kind == "embedding" else site.in_features
            return torch.zeros(0, width, dtype=torch.float64)
        core = self._core(index, torch.device("cpu"))
        largest = _largest(core)
        outside = core if live is None else _outside(core, live)
        strengths, rows = torch.linalg.svd(outside, full_matrices=False)[1:]
        found = rows[(strengths > _NEGLIGIBLE * largest)][:count]
        heads = found.gather(1, found.abs().argmax(dim=1, keepdim=True))
        return found * heads.sign()  # a singular vector is known up to its sign

    def energy(self, live: Sequence[Tensor] | None = None) -> Tensor:
        r"""Estimate the largest singular value of each site's average gradient G.

        For a unit row a of A, :math:`s\, \sigma_1(G)` is the longest gradient that a newborn's b
        can receive.

        Args:
            live: For each site, rows whose span is left out, such as its live rows of A.

        Returns:
            Shape ``(S,)``, on the sites' device; 0 while the sketch is closed or has seen nothing.
        """
        home = self._sites[0].A.device
        if not self.is_open:
            return torch.zeros(len(self._sites), device=home)
        largest = []
        for index, sketch in enumerate(self._sketches):
            has_doubles = sketch.right.device.type != "mps"
            core = self._core(index, sketch.right.device if has_doubles else torch.device("cpu"))
            if live is not None:
                core = _outside(core, live[index])
            largest.append(_largest(core))
        energies = torch.stack(largest).to(home, self._sketches[0].right.dtype)
        return energies / self._count.clamp_min(1)

    def average(self, what: str) -> None:
        """Bring together what the processes of the job have seen, before it is read or saved.

        Args:
            what: What is being done, as the subject of a sentence.
        """
        if self.is_open:
            processes.average([*(sums.total for sums in self._sums), self._count], what)

    def state(self) -> dict[str, Tensor]:
        """Return everything that a run resumed within the window needs; nothing while closed."""
        if not self.is_open:
            return {}
        parts = [("Y", 0), ("Z", 1)]
        totals = {f"{i}.{n}": s.total[j] for i, s in enumerate(self._sketches) for n, j in parts}
        return totals | {"count": self._count}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state`` returned into a sketch opened for the same event."""
        for key, tensor in self.state().items():
            tensor.copy_(state[key])

    def _is_finite(self, home: torch.device) -> Tensor:
        """Whether all that was seen of the step is: a dead site has no gradient that would tell."""
        sums = [sums.step.sum().to(home, non_blocking=True) for sums in self._sums]
        return torch.isfinite(torch.stack(sums)).all()

    def _check_passes(self) -> None:
        if self._passes == 0 and not self._warned:
            self._warned = True
            logger.warning(
                "no backward pass was seen, so newborns will point at random; a model compiled "
                "before overlooks hooks: set torch._dynamo.config.skip_nnmodule_hook_guards = "
                "False before it is compiled; a replayed CUDA graph overlooks them always; or "
                'set grow = "orthogonal"'
            )

    @torch.no_grad()
    def _note(self, index: int, x: Tensor, delta: Tensor) -> None:
        """Add one backward pass of one site to the step under way."""
        self._passes += 1
        sketch = self._sketches[index]
        products = project(self._sites[index], x, delta, sketch.right, sketch.left)
        for buffer, product in zip(sketch.step, products, strict=True):
            buffer.add_(product)

    def _core(self, index: int, device: torch.device) -> Tensor:
        r"""Return few rows with the Gram matrix of :math:`G` (embeddings: of :math:`G^\top`).

        They are float64, since Gram matrices square whatever separates directions.
        """
        site, sketch = self._sites[index], self._sketches[index]
        Y, Z = (t.to(device, torch.float64, copy=True) for t in sketch.total)
        broken = ~(torch.isfinite(Y).all() & torch.isfinite(Z).all())
        Y.masked_fill_(broken, 0)
        Z.masked_fill_(broken, 0)
        X = solve(Y, Z, sketch.left.to(device, torch.float64))
        if site.magnitude is not None:
            Y = Y * row_factor(site).to(Y).unsqueeze(1)
        if site.kind == "embedding":
            return _root(X @ X.T) @ Y.T  # (k, out)
        return _root(Y.T @ Y) @ X  # (k, in)

    def _allocate(self, event: int) -> None:
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, site in enumerate(self._sites):
            dtype = torch.promote_types(site.A.dtype, torch.float32)
            groups.setdefault((site.A.device, dtype), []).append(i)
        made: dict[int, _SiteSketch] = {}
        for (device, dtype), members in groups.items():
            draws = _Draws((self._seed, event), device, dtype)
            shapes = [self._shapes(self._sites[i]) for i in members]
            flat = [a * b for pair in shapes for a, b in pair]
            sums = _Sums(*(torch.zeros(sum(flat), device=device, dtype=dtype) for _ in range(2)))
            self._sums.append(sums)
            steps, totals = sums.step.split(flat), sums.total.split(flat)
            for j, i in enumerate(members):
                (out, k), (columns, width) = shapes[j]
                made[i] = _SiteSketch(
                    right=draws.matrix(0, width, k),
                    left=draws.matrix(1, out, columns),
                    step=(steps[2 * j].view(out, k), steps[2 * j + 1].view(columns, width)),
                    total=(totals[2 * j].view(out, k), totals[2 * j + 1].view(columns, width)),
                )
        self._sketches = [made[i] for i in range(len(self._sites))]

    def _shapes(self, site: Site) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the shapes of Y and Z."""
        k = min(self._width, site.in_features, site.out_features)
        return (site.out_features, k), (_OVERSAMPLING * k, site.in_features)


class _Draws:
    """Random test matrices; those of one side and size are the same matrix."""

    def __init__(self, seed: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> None:
        self._seed, self._device, self._dtype = seed, device, dtype
        self._made: dict[tuple[int, int, int], Tensor] = {}

    def matrix(self, side: int, rows: int, columns: int) -> Tensor:
        """Return normal numbers of shape ``(rows, columns)`` that are exact in bfloat16."""
        key = (side, rows, columns)
        if key not in self._made:
            words = np.random.SeedSequence([*self._seed, *key]).generate_state(1)
            generator = torch.Generator().manual_seed(int(words[0]))
            drawn = torch.randn(rows, columns, generator=generator).bfloat16()
            if self._device.type == "cuda":  # a copy from other memory would wait for the device
                drawn = drawn.pin_memory()
            self._made[key] = drawn.to(self._device, non_blocking=True).to(self._dtype)
        return self._made[key]


def solve(Y: Tensor, Z: Tensor, left: Tensor) -> Tensor:
    r"""Recover :math:`G \approx Y X` from its products with test matrices; return X.

    With another basis of Y's columns in its place, such as an orthonormal one, the product is the
    same. All that is decomposed here and below has a side of k or of the rank, and so is small
    enough for the host: on a GPU such decompositions take longer than all products.

    Args:
        Y: :math:`G \Omega`, shape ``(out, k)``.
        Z: :math:`\Psi^\top G`, shape ``(l, in)``, ``l >= k``.
        left: :math:`\Psi`, shape ``(out, l)``.

    Returns:
        Shape ``(k, in)``.
    """
    inverse = torch.linalg.pinv((left.T @ Y).cpu(), rtol=_RESOLVED)
    return inverse.to(Z.device) @ Z


def _root(gram: Tensor) -> Tensor:
    """Return a matrix with this Gram matrix."""
    values, vectors = torch.linalg.eigh(gram.cpu())
    return (values.clamp_min(0).sqrt().unsqueeze(1) * vectors.T).to(gram.device)


def _largest(rows: Tensor) -> Tensor:
    """Return the largest singular value of few rows, shape ``()``, on the host."""
    return torch.linalg.eigvalsh((rows @ rows.T).cpu())[-1].clamp_min(0).sqrt()


def _outside(rows: Tensor, live: Tensor) -> Tensor:
    """Take out of rows what the live rows span; these may be dependent, or zero.

    What is longer than the rounding of the longest live row counts as spanned.
    """
    live = live.detach().to(rows)
    gram = live @ live.T  # (rank, rank)
    tiny = torch.finfo(gram.dtype).tiny
    floor = (_RESOLVED * gram.diagonal().sum()).clamp_min(tiny)
    factor = torch.linalg.cholesky_ex(gram + floor * torch.eye(len(gram)).to(gram)).L
    for _ in range(2):  # the second pass takes out the rounding of the first
        rows = rows - torch.cholesky_solve(live @ rows.T, factor).T @ live
    return rows
