"""Where in a step numbers cease to be finite: the first layer in forward, and then in backward."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from rankflow.adapters.sites import Site
from rankflow.adapters.slots import local
from rankflow.importance.finite import Owned, are_sound, name_sites


class CloserLook:
    """Notes whether outputs and gradients are finite, in the order in which they are computed.

    It takes a reduction for each of them, so it is for a run in trouble. Layers in a compiled model
    may escape it.

    Args:
        sites: The sites, whose outputs are looked at.
        trained: What is trained.
    """

    def __init__(self, sites: Sequence[Site], trained: Sequence[Owned]) -> None:
        self._outputs: list[tuple[str | None, Tensor]] = []
        self._gradients: list[tuple[str | None, Tensor]] = []
        self._handles: list[RemovableHandle] = []
        for site in sites:
            hook = partial(self._note_output, site.name)
            self._handles.append(site.layer.register_forward_hook(hook))
        for parameter, owner in trained:
            note = partial(self._note_gradient, owner)
            self._handles.append(parameter.register_post_accumulate_grad_hook(note))

    def close(self) -> None:
        """Remove the hooks; what was noted stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def tell(self) -> str:
        """Say what was found, empty if nothing; waits for the device."""
        for what, notes in (("output", self._outputs), ("gradient", self._gradients)):
            bad = [owner for owner, finite in notes if not finite]
            if bad:
                return f"the first {what} that was not finite was that of {name_sites(bad[:1])}"
        return ""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _note_output(self, name: str, layer: Any, inputs: Any, output: Tensor) -> None:
        if torch.is_grad_enabled():
            self._outputs.append((name, torch.isfinite(output.detach()).all()))

    def _note_gradient(self, owner: str | None, parameter: Tensor) -> None:
        if parameter.grad is not None:
            norm = torch.linalg.vector_norm(local(parameter.grad))
            self._gradients.append((owner, are_sound(norm)))
