"""What happened to a step's gradients between backward and the optimizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from rankflow import processes
from rankflow.adapters.capture import is_capturing
from rankflow.adapters.sites import Site
from rankflow.adapters.slots import local
from rankflow.errors import RankFlowError
from rankflow.importance.finite import Owned, are_sound, norms_of_all

_PROBES = 4


@dataclass(frozen=True, slots=True)
class Reading:
    """What one step's gradients say, left on the device.

    Attributes:
        accept: Whether the step counts, a boolean of shape ``()``.
        unclip: Factor of shape ``()`` that brings the gradients back to backward's.
        finite: Whether the gradient of each parameter that has one is finite, shape ``(P,)``.
        owners: The name of each such parameter's site; None for a task head and the like.
    """

    accept: Tensor
    unclip: Tensor
    finite: Tensor
    owners: tuple[str | None, ...]


class StepGradients:
    r"""Whether a step's gradients are finite, and the factor by which they were scaled.

    Clipping multiplies every gradient by one unknown factor, and loops differ in where they do it.
    The factor is read off a few tensors: a hook notes their norm each time that backward has
    accumulated into them, and ``unclip`` compares it with the norm that is left,
    :math:`\lVert g_\text{backward} \rVert / \lVert g_\text{now} \rVert`. This holds for
    any loop, for gradient accumulation, and without waiting for the device. In a job of several
    processes the gradients are averaged at the end of backward, and noted after that. What was
    noted while a CUDA graph was captured is kept: each replay brings it up to date.

    Args:
        sites: The sites whose gradients are watched.
        others: What else the step trains, such as a task head: it must be finite too.

    Attributes:
        parameters: What is watched.
    """

    def __init__(self, sites: Sequence[Site], others: Sequence[nn.Parameter] = ()) -> None:
        self._handles: list[RemovableHandle] = []
        self._others = tuple(others)
        self.watch(sites)

    def watch(self, sites: Sequence[Site]) -> None:
        """Watch the parameters that the sites have now; call it again after every resize."""
        self.close()
        self.parameters: list[Owned] = [
            *((p, site.name) for site in sites for p in _trained(site)),
            *((p, None) for p in self._others),
        ]
        self._owners = tuple(name for _, name in self.parameters)
        self._home = sites[0].A.device
        # At the start what is zero has the only gradient: B, the gate, or VeRA's factors of rows.
        self._candidates = [s.trained[-1] for s in sites if s.rank > 0]
        self._probe(self._candidates)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def read(self, loss_scale: Tensor | float = 1.0) -> Reading:
        """Read the gradients of a step that is complete; does not wait for the device.

        A step does not count if one of its gradients is not finite, now or as backward left it, if
        their norm overflows, or if clipping has therefore made them all zero.

        Args:
            loss_scale: Factor that a gradient scaler put on the loss and has taken off since.

        Raises:
            RankFlowError: No adapter parameter has a gradient at all.
        """
        gradients = [p.grad for p, _ in self.parameters]
        present = [gradient for gradient in gradients if gradient is not None]
        owners = self._owners
        if len(present) < len(gradients):
            pairs = zip(gradients, self._owners, strict=True)
            owners = tuple(name for gradient, name in pairs if gradient is not None)
        if not any(owners):
            raise RankFlowError(
                "observe() found no gradient on any adapter parameter; call it after "
                "loss.backward() and before optimizer.step() and zero_grad(), with the adapter "
                "active and its parameters trainable"
            )
        norms = norms_of_all(present, self._home)
        total = torch.linalg.vector_norm(norms)
        before, now = self._at_probes()
        factor = torch.where(now > 0, before / now / loss_scale, 1)
        is_flat = (total == 0) & (before > 0)
        accept = are_sound(total * factor) & torch.isfinite(before) & ~is_flat
        return Reading(accept, factor, are_sound(norms), owners)

    @torch.no_grad()
    def mute(self, accept: Tensor) -> None:
        """Set all gradients to zero unless ``accept``, without waiting for the device."""
        refuse = {self._home: ~accept}
        for parameter, _ in self.parameters:
            gradient = parameter.grad
            if gradient is not None:
                if gradient.device not in refuse:
                    refuse[gradient.device] = (~accept).to(gradient.device, non_blocking=True)
                local(gradient).masked_fill_(refuse[gradient.device], 0)

    def _at_probes(self) -> tuple[Tensor, Tensor]:
        """Return the norm at the probes after backward and now; zeros if unknown."""
        noted = self._captured | self._accumulated
        seen = [p for p in self._probes if p in noted and p.grad is not None]
        if not seen:
            if self._handles:
                self._look_elsewhere()
            unknown = torch.zeros((), device=self._home)
            return unknown, unknown
        before = _total([noted[p] for p in seen], self._home)
        now = _total([_norm(p.grad) for p in seen if p.grad is not None], self._home)
        self._accumulated.clear()
        return before, now

    def _look_elsewhere(self) -> None:
        """Probe what has a gradient now: experts to which no token was sent have none."""
        self.close()
        reached = [p for p in self._candidates if p.grad is not None]
        self._probe(reached or self._candidates)

    def _probe(self, candidates: Sequence[nn.Parameter]) -> None:
        self._probes = _spread(candidates, _PROBES)
        self._accumulated: dict[nn.Parameter, Tensor] = {}
        self._captured: dict[nn.Parameter, Tensor] = {}
        self._handles = [
            probe.register_post_accumulate_grad_hook(self._note) for probe in self._probes
        ]

    def _note(self, parameter: nn.Parameter) -> None:
        if not processes.are_several():
            self._note_complete(parameter)
            return
        # The reducer has queued what averages the gradients, or will: what is queued when the queue
        # is worked off comes behind that.
        queue = Variable._execution_engine.queue_callback
        queue(lambda: queue(partial(self._note_complete, parameter)))

    def _note_complete(self, parameter: nn.Parameter) -> None:
        norm = _norm(parameter.grad)
        if is_capturing(norm):  # no hook runs when the graph is replayed, which fills the tensor
            self._captured[parameter] = norm
            self._accumulated.pop(parameter, None)
        else:
            self._accumulated[parameter] = norm


def trained_beside(model: nn.Module, sites: Sequence[Site]) -> list[nn.Parameter]:
    """Return what a model trains beside the adapter, such as a task head.

    Args:
        model: The model.
        sites: All sites of the adapter.
    """
    adapter = {id(p) for site in sites for p in (*site.trained, *site.named_parameters.values())}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in adapter]


def _trained(site: Site) -> tuple[nn.Parameter, ...]:
    factors = site.trained if site.rank > 0 else ()
    return factors if site.magnitude is None else (*factors, site.magnitude)


def _norm(gradient: Tensor | None) -> Tensor:
    assert gradient is not None  # the hooks run once it is there
    return torch.linalg.vector_norm(local(gradient).float())


def _total(norms: Sequence[Tensor], home: torch.device) -> Tensor:
    return torch.linalg.vector_norm(torch.stack([n.to(home, non_blocking=True) for n in norms]))


def _spread(items: Sequence[nn.Parameter], count: int) -> list[nn.Parameter]:
    """Pick up to ``count`` items, evenly over the sequence."""
    if not items:
        return []
    step = max(len(items) // count, 1)
    return list(items[::step])[:count]
