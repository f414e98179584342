"""What happened to a step's gradients between backward and the optimizer."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rankflow.adapters.sites import Site
from rankflow.errors import RankFlowError

_PROBES = 4


class StepGradients:
    r"""Whether a step's gradients are finite, and the factor by which they were scaled.

    Clipping multiplies every gradient by one unknown factor, and loops differ in where they do it.
    The factor is read off a few tensors: a hook notes their norm each time that backward has
    accumulated into them, and ``unclip`` compares it with the norm that is left,
    :math:`\sqrt{\lVert g_\text{backward} \rVert^2 / \lVert g_\text{now} \rVert^2}`. This holds for
    any loop, for gradient accumulation, and without waiting for the device.

    Args:
        sites: The sites whose gradients are watched.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self._handles: list[RemovableHandle] = []
        self.watch(sites)

    def watch(self, sites: Sequence[Site]) -> None:
        """Watch the parameters that the sites have now; call it again after every resize."""
        self.close()
        self._parameters: list[nn.Parameter] = []
        for site in sites:
            factors = site.trained if site.rank > 0 else ()
            magnitude = () if site.magnitude is None else (site.magnitude,)
            self._parameters += [*factors, *magnitude]
        # At the start what is zero has the only gradient: B, the gate, or VeRA's factors of rows.
        self._candidates = [s.trained[-1] for s in sites if s.rank > 0]
        self._probe(self._candidates)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def accept(self) -> Tensor:
        """Whether all gradients are finite, a boolean of shape ``()``.

        Raises:
            RankFlowError: No adapter parameter has a gradient at all.
        """
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if not gradients:
            raise RankFlowError(
                "observe() found no gradient on any adapter parameter; call it after "
                "loss.backward() and before optimizer.step() and zero_grad(), with the adapter "
                "active and its parameters trainable"
            )
        # The Euclidean norm is six times faster on a CPU than the largest entry. It overflows above
        # 1e19, and no step with such a gradient should count either.
        return torch.isfinite(nn.utils.get_total_norm(gradients))

    def unclip(self, loss_scale: Tensor | float) -> Tensor:
        """Return the factor of shape ``()`` that brings the gradients back to backward's.

        Args:
            loss_scale: Factor that a gradient scaler put on the loss and has taken off since.
        """
        home = self._parameters[0].device
        seen = [p for p in self._probes if p in self._accumulated and p.grad is not None]
        if not seen:
            if self._handles:
                self._look_elsewhere()
            return torch.ones((), device=home)
        before = _total([self._accumulated[p] for p in seen], home)
        now = _total([_square(p.grad) for p in seen if p.grad is not None], home)
        factor = (before / now).sqrt() / loss_scale
        self._accumulated.clear()
        return torch.where(now > 0, factor, 1)

    def _look_elsewhere(self) -> None:
        """Probe what has a gradient now: experts to which no token was sent have none."""
        self.close()
        reached = [p for p in self._candidates if p.grad is not None]
        self._probe(reached or self._candidates)

    def _probe(self, candidates: Sequence[nn.Parameter]) -> None:
        self._probes = _spread(candidates, _PROBES)
        self._accumulated: dict[nn.Parameter, Tensor] = {}
        self._handles = [
            probe.register_post_accumulate_grad_hook(self._note) for probe in self._probes
        ]

    def _note(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._accumulated[parameter] = _square(parameter.grad)  # type: ignore[index]


def _square(gradient: Tensor) -> Tensor:
    return gradient.detach().float().square().sum()


def _total(numbers: Sequence[Tensor], home: torch.device) -> Tensor:
    return torch.stack([n.to(home, non_blocking=True) for n in numbers]).sum()


def _spread(items: Sequence[nn.Parameter], count: int) -> list[nn.Parameter]:
    """Pick up to ``count`` items, evenly over the sequence."""
    if not items:
        return []
    step = max(len(items) // count, 1)
    return list(items[::step])[:count]
