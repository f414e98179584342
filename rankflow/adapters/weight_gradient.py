r"""Products with the gradient of a site's effective weight, which itself is never formed.

With the layer's input x and the gradient :math:`\delta` of its output, the weight's gradient is
:math:`G = \sum_\text{tokens} \delta^\top x`, shape ``(out, in)``: a matrix of the weight's size at
every site. Its products with a few vectors on either side cost two thin products each.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from rankflow.adapters.row_norms import own_precision
from rankflow.adapters.sites import Site

_CONVOLVE = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_CONV_WEIGHT = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}


@torch.no_grad()
def project(
    site: Site, x: Tensor, delta: Tensor, right: Tensor, left: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Return :math:`G R` and :math:`L^\top G` for one backward pass of one layer.

    The products have the precision of ``delta``; in half precision, whose range a sum over tokens
    leaves under a loss scale, that of float32.

    Args:
        site: The site.
        x: Input of its layer: features ``(..., in)``, an image ``(batch, channels, ...)``, or the
            token ids of an embedding.
        delta: Gradient of the layer's output.
        right: R, shape ``(in_features, k)``.
        left: L, shape ``(out_features, l)``.

    Returns:
        Shapes ``(out_features, k)`` and ``(l, in_features)``.
    """
    dtype = torch.float32 if delta.dtype == torch.float16 else delta.dtype
    delta, right, left = delta.to(dtype), right.to(dtype), left.to(dtype)
    with own_precision(delta):
        match site.kind:
            case "linear":
                return _of_linear(x.to(dtype), delta, right, left)
            case "conv":
                return _of_convolution(site, x.to(dtype), delta, right, left)
            case "embedding":
                return _of_embedding(site, x, delta, right, left)


def _of_linear(x: Tensor, delta: Tensor, right: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    x = x.reshape(-1, x.shape[-1])  # (tokens, in)
    delta = delta.reshape(-1, delta.shape[-1])  # (tokens, out)
    return delta.T @ (x @ right), (delta @ left).T @ x


def _of_convolution(
    site: Site, x: Tensor, delta: Tensor, right: Tensor, left: Tensor
) -> tuple[Tensor, Tensor]:
    base = site.layer.get_base_layer()
    dims = len(base.kernel_size)
    convolve = _CONVOLVE[dims]
    x = x.reshape(-1, *x.shape[-dims - 1 :])  # (batch, in, ...)
    delta = delta.reshape(-1, *delta.shape[-dims - 1 :])  # (batch, out, ...)
    padding = base.padding
    if isinstance(padding, str):  # "same" may pad unevenly
        x, padding = functional.pad(x, base._reversed_padding_repeated_twice), (0,) * dims
    kernels = (right.shape[1], *site.A.shape[1:])
    seen = convolve(x, right.T.reshape(kernels), None, base.stride, padding)  # (batch, k, ...)
    Y = _channels_first(delta) @ _channels_first(seen).T
    mixed = convolve(delta, left.T.reshape(*left.T.shape, *[1] * dims))  # (batch, l, ...)
    kernels = (left.shape[1], *site.A.shape[1:])
    Z = _CONV_WEIGHT[dims](x, kernels, mixed, base.stride, padding)
    return Y, Z.flatten(1)


def _channels_first(image: Tensor) -> Tensor:
    """Turn ``(batch, channels, ...)`` into ``(channels, positions)``."""
    return image.transpose(0, 1).flatten(1)


def _of_embedding(
    site: Site, tokens: Tensor, delta: Tensor, right: Tensor, left: Tensor
) -> tuple[Tensor, Tensor]:
    base: nn.Embedding = site.layer.get_base_layer()
    scale = site.layer._get_embed_scale()
    if scale is not None:  # Gemma's embeddings multiply their output
        delta = delta * scale.to(delta.dtype)
    tokens = tokens.reshape(-1)
    delta = delta.reshape(-1, delta.shape[-1])  # (tokens, width)
    padding = -1 if base.padding_idx is None else base.padding_idx
    delta = delta * (tokens != padding).unsqueeze(1)
    # Unlike index_add_, the embedding's own backward sums in one order on every device.
    Z = torch.ops.aten.embedding_dense_backward(
        delta @ left, tokens, base.num_embeddings, -1, False
    )  # (vocabulary, l)
    return delta.T @ right[tokens], Z.T
