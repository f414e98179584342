"""How well a classifier does: accuracy, and the negative log-likelihood of the true class."""

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp
from transformers import EvalPrediction

from rankflow.training.tokens import IGNORED


def classification_metrics(
    logits: npt.NDArray[np.floating], labels: npt.NDArray[np.integer]
) -> dict[str, float]:
    r"""Return the accuracy and :math:`-\frac{1}{N} \sum_n \log p(y_n)`, in float64.

    Args:
        logits: One row per text or word, shape ``(N, classes)``.
        labels: True classes, shape ``(N,)``.

    Returns:
        ``accuracy`` (0 to 1) and ``nll`` (nats).

    >>> metrics = classification_metrics(np.array([[2.0, 2.0], [0.0, 9.0]]), np.array([0, 1]))
    >>> metrics["accuracy"], round(metrics["nll"], 4)
    (1.0, 0.3466)
    """
    logits = logits.astype(np.float64)
    chosen = logits[np.arange(len(labels)), labels]
    return {
        "accuracy": float(np.mean(logits.argmax(axis=1) == labels)),
        "nll": float(np.mean(logsumexp(logits, axis=1) - chosen)),
    }


def measure_predictions(prediction: EvalPrediction) -> dict[str, float]:
    """Return the classification metrics of a Trainer's predictions, over labelled places only."""
    logits, labels = prediction.predictions, prediction.label_ids
    labelled = labels != IGNORED
    return classification_metrics(logits[labelled], labels[labelled])
