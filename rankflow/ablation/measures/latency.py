"""How long the adapted model takes to answer, beside the base model, merged and not."""

from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from statistics import median

from torch import Tensor, nn

from rankflow.ablation.measures.modes import evaluating, without_trainer_precision
from rankflow.ablation.methods.method import Built
from rankflow.ablation.records import Latency
from rankflow.bench.clock import seconds

_WARM_UP = 2  # rounds that are not counted


def measure_latency(
    base: nn.Module, built: Built, batch: Mapping[str, Tensor], *, rounds: int
) -> Latency:
    """Time one forward pass without gradients; medians of rounds in which all models take turns.

    All run in the precision of the caller's ``torch.autocast``, whatever a Trainer left on one.

    Args:
        base: The base model, untouched and on the device of the adapted one.
        built: The method's model, trained or not.
        batch: What the models are called with, labels left out unless they cannot do without.
        rounds: Rounds to time.
    """
    device = next(built.model.parameters()).device
    inputs = {key: value.to(device) for key, value in batch.items()}
    models = {"base": base, "unmerged": built.model}
    times: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        stack.enter_context(without_trainer_precision(built.model))
        if built.merge is not None:
            models["merged"] = built.merge()
        for model in models.values():
            stack.enter_context(evaluating(model))
        for _ in range(_WARM_UP + rounds):
            for name, model in models.items():
                times[name].append(seconds(partial(model, **inputs), device))
    medians = {name: median(values[_WARM_UP:]) for name, values in times.items()}
    return Latency(medians["base"], medians["unmerged"], medians.get("merged"))
