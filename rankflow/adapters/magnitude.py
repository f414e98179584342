"""DoRA's magnitude as something that a site may have or lack."""

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rankflow.adapters.row_norms import measure_norms


def neutral_magnitude(layer: LoraLayer, adapter_name: str, A: Tensor, B: Tensor) -> Tensor:
    r"""Return the magnitude that changes nothing, :math:`m = \lVert W + s B A \rVert`.

    Args:
        layer: The adapted layer, of a DoRA adapter.
        adapter_name: The adapter.
        A: Right factor.
        B: Left factor.

    Returns:
        Norms in the shape, type and place that PEFT gives a magnitude.
    """
    slot = layer.lora_magnitude_vector[adapter_name].weight
    norms = measure_norms(layer, A, B, layer.scaling[adapter_name])
    return norms.to(slot.device, slot.dtype).view(_shape(layer, len(norms)))


def empty_magnitude(slot: nn.Parameter) -> Tensor:
    """Return what takes the place of a magnitude that is turned off."""
    return slot.detach().new_empty(0)


def _shape(layer: LoraLayer, outputs: int) -> tuple[int, ...]:
    base = layer.get_base_layer()
    if isinstance(base, nn.modules.conv._ConvNd):
        return (1, outputs, *[1] * len(base.kernel_size))
    return (outputs,)
