r"""How well the model still does what it could do before: similarity, or language.

The model is called as a whole, whatever adapts it, because prompts live outside of the modules that
they act on. Prompts put the states of their virtual tokens first, so the states of a text are the
last ones.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from rankflow.ablation.measures.general_data import ForgettingData, GeneralTexts, ScoredPairs
from rankflow.ablation.measures.modes import evaluating
from rankflow.errors import RankFlowError
from rankflow.training.pooling import TokenPooling, pool
from rankflow.training.tokens import chunk

Ids = list[int]


def measure_forgetting(
    model: nn.Module,
    data: ForgettingData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    pooling: TokenPooling = "mean",
    max_length: int = 128,
    batch_size: int = 64,
) -> float:
    """Measure what the data can show: the similarity of pairs, or the perplexity of texts.

    Args:
        model: The base model, or the model of any method.
        data: The rows.
        tokenizer: The model's tokenizer.
        pooling: How an encoder's states become one vector.
        max_length: Longest text (tokens); similarity cuts it there, perplexity goes on behind.
        batch_size: Texts at a time.
    """
    if isinstance(data, ScoredPairs):
        return measure_similarity(model, data, tokenizer, pooling, max_length, batch_size)
    return measure_perplexity(model, data, tokenizer, max_length, batch_size)


def measure_similarity(
    model: nn.Module,
    pairs: ScoredPairs,
    tokenizer: PreTrainedTokenizerBase,
    pooling: TokenPooling,
    max_length: int,
    batch_size: int,
) -> float:
    """Return Spearman's correlation of cosine similarities with the scores.

    The last hidden states are pooled; a task head has no part in it.

    Returns:
        -1 to 1, higher is better; NaN if the states are not finite, or all the same.
    """
    texts = list(dict.fromkeys((*pairs.first, *pairs.second)))
    ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    states = dict(zip(texts, _embed(model, ids, tokenizer, pooling, batch_size), strict=True))
    first, second = (
        torch.stack([states[text] for text in side]) for side in (pairs.first, pairs.second)
    )
    cosines = functional.cosine_similarity(first.double(), second.double())
    if not cosines.isfinite().all() or cosines.max() == cosines.min():
        return math.nan
    return float(spearmanr(cosines.numpy(), pairs.scores).statistic)


def measure_perplexity(
    model: nn.Module,
    data: GeneralTexts,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    batch_size: int,
) -> float:
    """Return the perplexity of the tokens behind the first of each piece of text.

    Returns:
        1 or more, lower is better; infinite or NaN if the model diverged.

    Raises:
        RankFlowError: No text has two tokens.
    """
    pieces = [
        piece
        for ids in tokenizer(list(data.texts), verbose=False)["input_ids"]
        for piece in chunk(ids, max_length)
    ]
    if not pieces:
        raise RankFlowError("no text has the two tokens that a prediction needs")
    total, count = torch.zeros((), dtype=torch.float64), 0
    with evaluating(model):
        for _, tokens, mask in _batches(model, pieces, tokenizer, batch_size):
            logits = model(input_ids=tokens, attention_mask=mask).logits
            logits = logits[:, -tokens.shape[1] :]  # behind the virtual tokens
            predicted = mask[:, 1:].bool()
            total += functional.cross_entropy(
                logits[:, :-1][predicted].float(), tokens[:, 1:][predicted], reduction="sum"
            ).cpu()
            count += int(predicted.sum())
    return (total / count).exp().item()


def _embed(
    model: nn.Module,
    ids: Sequence[Ids],
    tokenizer: PreTrainedTokenizerBase,
    pooling: TokenPooling,
    batch_size: int,
) -> list[Tensor]:
    states: dict[int, Tensor] = {}
    with evaluating(model):
        for rows, tokens, mask in _batches(model, ids, tokenizer, batch_size):
            outputs = model(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
            hidden = outputs.hidden_states[-1]  # (batch, tokens, width)
            states.update(zip(rows, pool(hidden, mask, pooling).cpu(), strict=True))
    return [states[row] for row in range(len(ids))]


def _batches(
    model: nn.Module, ids: Sequence[Ids], tokenizer: PreTrainedTokenizerBase, size: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield row numbers, token ids and mask, shortest rows first so that little is padded."""
    device = next(model.parameters()).device
    order = np.argsort([len(row) for row in ids], kind="stable").tolist()
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        tokens = pad_sequence(
            [torch.tensor(ids[row]) for row in rows],
            batch_first=True,
            padding_value=tokenizer.pad_token_id,
        )
        lengths = torch.tensor([len(ids[row]) for row in rows])
        mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()  # (rows, tokens)
        yield rows, tokens.to(device), mask.to(device)
