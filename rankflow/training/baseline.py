"""The baseline that fine-tuning must beat: a linear head on the untouched encoder.

Its features never change, so they are computed once, and its head is the minimum of a convex
problem: it is fitted to the end rather than trained for some steps, which makes the baseline as
strong as it can be.
"""

from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from rankflow.training.metrics import classification_metrics
from rankflow.training.pooling import TokenPooling, pool
from rankflow.training.tokens import IGNORED, Collator

_PENALTIES = (1e-1, 1e-2, 1e-3)  # strong to weak: each fit starts from the one before
_MAX_ITERATIONS = 100
_MAX_ROWS = 20_000  # training rows; more hardly move a linear head
_BATCH = 64  # rows


@dataclass(frozen=True, slots=True)
class Features:
    """Frozen features, shape ``(N, width)``, and their classes, shape ``(N,)``."""

    values: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True, slots=True)
class LinearHead:
    """A linear classifier: ``weight`` of shape ``(classes, width)``, ``bias`` of ``(classes,)``."""

    weight: torch.Tensor
    bias: torch.Tensor

    def measure(self, features: Features) -> dict[str, float]:
        """Return the accuracy and the negative log-likelihood on the features."""
        logits = functional.linear(features.values, self.weight, self.bias)
        return classification_metrics(logits.numpy(), features.labels.numpy())


@dataclass(frozen=True, slots=True)
class Baseline:
    """The fitted head, and its metrics on the judged split (empty if there is none)."""

    head: LinearHead
    metrics: dict[str, float]


def fit_baseline(
    model: PreTrainedModel,
    splits: DatasetDict,
    judged: str | None,
    collate: Collator,
    pooling: TokenPooling | None,
    classes: int,
) -> Baseline:
    """Fit a linear head on the model's frozen encoder and judge it.

    The penalty is chosen on the validation rows, to the baseline's favour where those are judged.

    Args:
        model: The base model before an adapter is put on it.
        splits: Tokenised rows.
        judged: The split to judge on, if any.
        collate: Pads rows into a batch.
        pooling: How a text's tokens become one feature; None if each labelled token is one.
        classes: Number of classes.
    """
    train = splits["train"].select(range(min(_MAX_ROWS, len(splits["train"]))))
    heads = fit_heads(compute_features(model, train, collate, pooling), classes)
    if judged is None:
        return Baseline(heads[0], {})
    held_out = {
        name: compute_features(model, splits[name], collate, pooling)
        for name in {"validation", judged}.intersection(splits)
    }
    chosen_on = held_out.get("validation", held_out[judged])
    best = min(heads, key=lambda head: head.measure(chosen_on)["nll"])
    return Baseline(best, best.measure(held_out[judged]))


def fit_heads(features: Features, classes: int) -> list[LinearHead]:
    r"""Minimise cross entropy :math:`+ \frac{\lambda}{2} \lVert W \rVert^2` for each penalty.

    The penalty acts on standardised features; the heads take the features as they are.

    Args:
        features: Training features.
        classes: Number of classes.

    Returns:
        One head per penalty :math:`\lambda`, strong to weak.
    """
    shift, scale = features.values.mean(dim=0), features.values.std(dim=0) + 1e-6
    values = (features.values - shift) / scale
    weight = torch.zeros(classes, values.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    heads = []
    for penalty in _PENALTIES:
        _minimise(values, features.labels, weight, bias, penalty)
        unscaled = weight.detach() / scale
        heads.append(LinearHead(unscaled, bias.detach() - unscaled @ shift))
    return heads


def compute_features(
    model: PreTrainedModel, rows: Dataset, collate: Collator, pooling: TokenPooling | None
) -> Features:
    """Run the encoder over the rows, shortest first, so that little is padded."""
    order = np.argsort([len(ids) for ids in rows["input_ids"]], kind="stable")
    loader = DataLoader(rows.select(order), batch_size=_BATCH, collate_fn=collate)
    values, labels = [], []
    model.eval()
    with torch.no_grad():
        for batch in loader:
            inputs = {key: value.to(model.device) for key, value in batch.items()}
            targets = inputs.pop("labels")
            hidden = model.base_model(**inputs).last_hidden_state  # (batch, tokens, width)
            if pooling is None:
                labelled = targets != IGNORED
                values.append(hidden[labelled].float().cpu())  # (words, width)
                labels.append(targets[labelled].cpu())
            else:
                values.append(pool(hidden, inputs["attention_mask"], pooling).cpu())
                labels.append(targets.cpu())
    return Features(torch.cat(values), torch.cat(labels))


def _minimise(
    values: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    penalty: float,
) -> None:
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=_MAX_ITERATIONS, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logits = functional.linear(values, weight, bias)
        loss = functional.cross_entropy(logits, labels) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
