"""Show the input of a layer and the gradient of its output to whoever sketches them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from rankflow.adapters.sites import Site

Note = Callable[[Tensor, Tensor], None]
"""Called in backward with a layer's input and the gradient of its output."""


class _Watch(torch.autograd.Function):
    """The identity on a layer's output.

    The input is saved as autograd saves tensors: by reference, and under gradient checkpointing or
    offloading not at all. The output counts as modified in place, so that it stays no view, and may
    be modified again. The anchor makes backward come here even where all before is frozen.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, note: Note) -> Tensor:
        """Return ``output`` itself."""
        ctx.mark_dirty(output)
        ctx.save_for_backward(x)
        ctx.note = note
        return output

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        """Show the input and the gradient, and pass the gradient on."""
        (x,) = ctx.saved_tensors
        ctx.note(x.detach(), delta.detach())
        return delta if ctx.needs_input_grad[0] else None, None, None, None


def watch(site: Site, note: Note) -> RemovableHandle:
    """Show every backward pass through a site's layer, until the handle is removed.

    Each call of the layer in a step is shown, also those of a layer that is called several times;
    passes without gradient are not, nor those in which the adapter does not take part.

    Args:
        site: The site.
        note: Called in backward with the layer's input and the gradient of its output; it must not
            keep them.
    """
    anchor = torch.zeros((), device=site.A.device, requires_grad=True)
    hook = partial(_after_forward, site, anchor, note)
    return site.layer.register_forward_hook(hook, with_kwargs=True)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _after_forward(
    site: Site, anchor: Tensor, note: Note, layer: Any, args: Any, kwargs: Any, output: Tensor
) -> Tensor | None:
    if not torch.is_grad_enabled() or layer.disable_adapters or layer.merged:
        return None
    if site.adapter_name not in layer.active_adapters:
        return None
    return _Watch.apply(output, args[0] if args else kwargs["x"], anchor, note)
