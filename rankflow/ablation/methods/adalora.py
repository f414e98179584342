r"""AdaLoRA by PEFT, driven as its paper asks (arXiv 2303.10512).

Three things have to happen that a plain Trainer leaves out, without a word:

- the allocator has to see every step's gradients, between the update and ``zero_grad``;
- the orthogonal penalty, :math:`\gamma` times the mean of :math:`\|P P^T - I\|_F` over the factors
  of all sites, has to join the loss. PEFT adds it to ``outputs.loss``, and so never where a Trainer
  computes the loss from logits, and also to the loss of an evaluation, where it does not belong.
  Here PEFT adds nothing, and the penalty's gradient joins the complete, clipped ones;
- the schedule has to know the length of the run.

PEFT masks components instead of removing them: 1.5 times as many as are kept train throughout.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from peft import AdaLoraConfig
from peft.tuners.adalora import AdaLoraModel, SVDLinear
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankflow.ablation.methods.method import Built, Setting, UnsupportedError
from rankflow.ablation.methods.peft_tuners import add_tuner, make_config, merge_copy
from rankflow.ablation.methods.targets import find_targets
from rankflow.training.models import BaseModel

_ADAPTER: Final = "default"
_ORTHOGONALITY: Final = 0.5  # PEFT's weight of the penalty
_LORA_DEFAULT: Final = 8  # peft.LoraConfig's r and lora_alpha


@dataclass(frozen=True, slots=True)
class AdaloraMethod:
    """AdaLoRA; its size is the number of components that it keeps, over all sites.

    Components are kept by one threshold that does not look at what they cost, so the parameters of
    a size are an expectation, at the mean cost of a site's component. What was kept in the end is
    counted exactly, and may exceed the budget.
    """

    summary: str = "AdaLoRA by PEFT, its allocator and its penalty driven as the paper asks"
    source: str = "arXiv 2303.10512"
    rate: float = 1.6e-2
    scalings: tuple[float, ...] = (1.0, 2.0, 4.0)
    quantised: bool = False
    size_name: str = "components"

    def sizes(self, base: BaseModel, setting: Setting) -> Sequence[int]:
        """Return the sizes to choose from.

        Raises:
            UnsupportedError: The run is too short to allocate in, or a site is not linear.
        """
        if setting.steps < 3:
            raise UnsupportedError(
                f"AdaLoRA scores, then masks, then trains on: 3 optimizer steps at least, "
                f"and the run has {setting.steps}"
            )
        targets = find_targets(base, setting).values()
        return range(1, sum(min(target.inputs, target.outputs) for target in targets) + 1)

    def build(self, base: BaseModel, setting: Setting, size: int | None) -> Built:
        """Wrap the base model by PEFT, and make the callback that drives it.

        Raises:
            UnsupportedError: PEFT refuses the model.
        """
        assert size is not None
        targets = find_targets(base, setting)
        warmup, end, every = schedule(setting.steps)
        rank = math.ceil(1.5 * size / len(targets))
        adapter = setting.adapter
        scale = adapter.get("lora_alpha", _LORA_DEFAULT) / adapter.get("r", _LORA_DEFAULT)
        keywords = {
            "target_modules": list(targets),
            "init_r": rank,
            "target_r": max(1, size // len(targets)),
            "tinit": warmup,
            "tfinal": end,
            "deltaT": every,
            "total_step": setting.steps,
            # PEFT divides by the rank at the start, to the end of the run.
            "lora_alpha": scale * rank,
            "lora_dropout": adapter.get("lora_dropout", 0.0),
            "orth_reg_weight": 0.0,  # the callback adds it
            "fan_in_fan_out": next(iter(targets.values())).transposed,
        }
        config = make_config(AdaLoraConfig, base, setting, keywords)
        model = add_tuner(base, config)
        tuner: AdaLoraModel = model.base_model
        tuner.rankallocator.target_bgt = size
        sites = [module for module in model.modules() if isinstance(module, SVDLinear)]
        for site in sites:
            # Where PEFT moves it to another device or type it becomes trainable, and would rescale
            # the site as it drifts.
            site.ranknum[_ADAPTER].requires_grad_(False)
        costs = [target.inputs + target.outputs + 1 for target in targets.values()]
        return Built(
            model,
            callbacks=(AdaloraCallback(tuner, sites),),
            final=partial(count_kept, tuner, sites, size * sum(costs) // len(costs)),
            merge=partial(merge_copy, model),
        )


class AdaloraCallback(TrainerCallback):
    """Adds the penalty's gradient, and lets the allocator see every step.

    Args:
        tuner: PEFT's model.
        sites: Its sites.
    """

    def __init__(self, tuner: AdaLoraModel, sites: Sequence[SVDLinear]) -> None:
        self._tuner = tuner
        self._sites = sites

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Add the gradient of the orthogonal penalty."""
        add_penalty_gradient(self._sites, _ORTHOGONALITY)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Score and allocate; the gradients of the step are still there."""
        self._tuner.update_and_allocate(state.global_step + 1)  # it is counted after this event


def schedule(steps: int) -> tuple[int, int, int]:
    """Return the steps before the first allocation, after the last one, and between two.

    Args:
        steps: Optimizer steps of the run, 3 at least.

    >>> schedule(1000)
    (100, 500, 10)
    >>> schedule(3)
    (0, 1, 1)
    """
    return steps // 10, steps // 2, max(1, steps // 100)


@torch.no_grad()
def add_penalty_gradient(sites: Sequence[SVDLinear], weight: float) -> None:
    r"""Add the gradient of ``weight`` times the mean of :math:`\|P P^T - I\|_F` over all factors.

    .. math:: \frac{w}{2n} \cdot \frac{2 (P P^T - I) P}{\|P P^T - I\|_F}
    """
    share = weight / (2 * len(sites))
    for site in sites:
        right, left = site.lora_A[_ADAPTER], site.lora_B[_ADAPTER]  # (rank, in), (out, rank)
        _add(right, share * _penalty_gradient(right))
        _add(left, share * _penalty_gradient(left.T).T)


def _penalty_gradient(rows: Tensor) -> Tensor:
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    excess = wide @ wide.T
    excess.diagonal().sub_(1.0)
    return (excess @ wide) * (2 / excess.norm().clamp_min(1e-12))


def _add(parameter: nn.Parameter, gradient: Tensor) -> None:
    gradient = gradient.to(parameter.dtype).contiguous()
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def count_kept(tuner: AdaLoraModel, sites: Sequence[SVDLinear], expected: int) -> int:
    """Return the parameters of the components that are not masked.

    Args:
        tuner: PEFT's model.
        sites: Its sites.
        expected: The answer before the first allocation.
    """
    if tuner.peft_config[_ADAPTER].rank_pattern is None:
        return expected
    return sum(
        int((site.lora_E[_ADAPTER] != 0).sum()) * (site.in_features + site.out_features + 1)
        for site in sites
    )
