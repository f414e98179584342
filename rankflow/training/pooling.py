r"""Sentence classification by a stock token classifier.

A token classifier computes logits :math:`z_t = W h_t + b` for every token. Averaging them over the
tokens of a text is exactly a linear head on the mean-pooled hidden state,

.. math:: \frac{1}{T} \sum_t (W h_t + b) = W \Big(\frac{1}{T} \sum_t h_t\Big) + b,

so a mean-pooled classifier needs no model class of its own: its adapter and head load with stock
PEFT on ``AutoModelForTokenClassification``. The same holds for the logits of the first token.
"""

from typing import Literal

import torch

TokenPooling = Literal["mean", "cls"]


def pool(values: torch.Tensor, attention_mask: torch.Tensor, pooling: TokenPooling) -> torch.Tensor:
    """Reduce a value per token to a value per text.

    Args:
        values: Logits or hidden states, shape ``(batch, tokens, width)``; those of virtual tokens,
            if there are any, come first and are left out.
        attention_mask: 1 for tokens and 0 for padding, shape ``(batch, tokens)``.
        pooling: ``mean`` averages over the tokens, ``cls`` takes the first of them.

    Returns:
        Pooled values in float32 or wider, shape ``(batch, width)``.
    """
    values = values[:, -attention_mask.shape[1] :]
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    if pooling == "cls":
        first = attention_mask.argmax(dim=1)  # padding may stand on the left
        return values[torch.arange(len(values), device=values.device), first]
    weights = attention_mask.to(values.dtype).unsqueeze(-1)  # (batch, tokens, 1)
    return (values * weights).sum(dim=1) / weights.sum(dim=1)
