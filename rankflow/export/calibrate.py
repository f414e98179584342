r"""What each orthogonal component of a model's adapter is worth to a loss that is measured.

If component k were multiplied by a gate :math:`g_k`, then at :math:`g_k = 1`, with the gradient G
of the loss with respect to V,

.. math:: T_k = \frac{\partial L}{\partial g_k} = s \langle G, B A v_k v_k^\top \rangle
    = \Bigl\langle B A v_k, \; \frac{\partial L}{\partial B} y_k \Bigr\rangle,
    \qquad A^\top y_k = v_k,

since :math:`\partial L / \partial B = s G A^\top`. So the gradient of B as it stands is enough: no
weight is touched, and a batch costs one backward pass for all components together. The score is
:math:`E[T_k^2]` over batches, to second order and up to a factor the loss that leaving k out adds
where the adapter has been trained to a minimum: there the mean of T is 0, and its variance is the
Fisher information (Theis et al. 2018, arXiv 1801.05787).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankflow.adapters.sites import Site
from rankflow.errors import RankFlowError
from rankflow.export.decompose import Decomposition
from rankflow.records import FloatArray

Loss = Callable[[Any], Tensor]
"""From a batch to the scalar loss of the model on it."""


def loss_scores(
    model: nn.Module,
    sites: Sequence[Site],
    parts: Sequence[Decomposition],
    loss: Loss,
    batches: Iterable[Any],
) -> list[FloatArray]:
    """Score the components of every site on calibration batches.

    The model is evaluated without dropout, and is left as it was, its gradients included.

    Args:
        model: The model, whose adapter is active.
        sites: Its sites.
        parts: Their components.
        loss: From a batch to the loss of the model on it.
        batches: The calibration set, batches of one size.

    Returns:
        For each site the scores of its components, shape ``(k,)``.

    Raises:
        RankFlowError: There is no batch, or a loss or a gradient is not finite, or the loss does
            not depend on the adapter.
    """
    projections = [_project(site, part) for site, part in zip(sites, parts, strict=True)]
    totals = [torch.zeros(len(part.energies), dtype=torch.float64) for part in parts]
    count = 0
    with _differentiable(model, [site.B for site in sites]) as factors:
        for batch in batches:
            gradients = torch.autograd.grad(loss(batch), factors, allow_unused=True)
            _check(gradients)
            for i, gradient in enumerate(gradients):
                if gradient is not None:
                    G = gradient.flatten(1).to("cpu", torch.float64) @ projections[i]  # (out, k)
                    totals[i] += (parts[i].B * G).sum(dim=0).square()
            count += 1
    if count == 0:
        raise RankFlowError("the calibration set is empty; give at least one batch")
    return [(total / count).numpy() for total in totals]


def _project(site: Site, part: Decomposition) -> Tensor:
    """Return the y of every component times the length of its row of A, shape ``(rank, k)``."""
    A = site.A.detach().flatten(1).to("cpu", torch.float64)
    return torch.linalg.pinv(A.T) @ part.A.T


def _check(gradients: Sequence[Tensor | None]) -> None:
    present = [gradient for gradient in gradients if gradient is not None]
    if not present:
        raise RankFlowError(
            "the calibration loss does not depend on the adapter; activate it with "
            "model.set_adapter(...), and compute the loss by this very model"
        )
    if not all(bool(torch.isfinite(gradient).all()) for gradient in present):
        raise RankFlowError(
            "the calibration loss has a gradient that is not finite; look for a batch whose loss "
            "overflows, or load the model in float32"
        )


@contextmanager
def _differentiable(
    model: nn.Module, factors: Sequence[nn.Parameter]
) -> Iterator[list[nn.Parameter]]:
    """Let the loss be differentiated, in evaluation mode; put modes and flags back at the end."""
    training = [module for module in model.modules() if module.training]
    frozen = [factor for factor in factors if not factor.requires_grad]
    model.eval()
    for factor in frozen:
        factor.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield list(factors)
    finally:
        for factor in frozen:
            factor.requires_grad_(False)
        for module in training:
            module.training = True
