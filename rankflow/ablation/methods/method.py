"""What an ablation asks of a method: to build a trainable model of a given size."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn
from transformers import TrainerCallback

from rankflow.ablation.records import RankHistory
from rankflow.errors import RankFlowError
from rankflow.specs.budget import BudgetSpec
from rankflow.specs.run import ModelSpec
from rankflow.training.models import BaseModel


class UnsupportedError(RankFlowError):
    """A method cannot run on this model, or at no size; the message says why."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a method has to fit into.

    Attributes:
        model: The base model and its task; None for the planted teacher.
        adapter: Keywords of ``peft.LoraConfig``; other methods take ``target_modules`` from it,
            and what else they have in common with LoRA.
        parameters: The budget: trainable parameters, a task head left out.
        steps: Optimizer steps of the run.
        seed: Seed of the run.
        options: What the spec's ``[method.NAME]`` says beyond the declaration.
        rank: The budget as the rank of plain LoRA.
        max_length: Longest text that the model must have positions for, in tokens.
        learned: The ranks of the run that a control retrains; None for other methods.
    """

    model: ModelSpec | None
    adapter: Mapping[str, Any]
    parameters: int
    steps: int
    seed: int
    options: Mapping[str, Any]
    rank: float = 1.0
    max_length: int = 128
    learned: RankHistory | None = None


@dataclass(frozen=True, slots=True)
class Built:
    """A model that is ready to train; exactly what trains has ``requires_grad``.

    Attributes:
        model: What the Trainer trains. Its forward takes the batch of the base model and returns
            the base model's outputs, for prompts with the logits of the virtual tokens first.
        callbacks: What has to happen while it trains.
        budget: The budget under which RankFlow steers it; None if RankFlow has no part in it.
        finish: Called once training is over, before the model is judged; changes it in place.
        final: Parameters that adapt the model now, where that is not the number of those that
            train (AdaLoRA masks and keeps them); None where it is.
        merge: Returns a model of the base's architecture with the adaptation folded in, leaving
            ``model`` as it is; None where that cannot be done.
    """

    model: nn.Module
    callbacks: tuple[TrainerCallback, ...] = ()
    budget: BudgetSpec | None = None
    finish: Callable[[], object] | None = None
    final: Callable[[], int] | None = None
    merge: Callable[[], nn.Module] | None = None


class Method(Protocol):
    """One row of a comparison."""

    @property
    def summary(self) -> str:
        """One line for people: what it is, and whose implementation."""

    @property
    def source(self) -> str:
        """The paper."""

    @property
    def rate(self) -> float:
        """A usual learning rate, where tuning starts."""

    @property
    def scalings(self) -> tuple[float, ...]:
        """Factors on the adapter's scale that are tuned; ``(1.0,)`` for none."""

    @property
    def quantised(self) -> bool:
        """Whether the base weights are in 4 bits."""

    @property
    def size_name(self) -> str:
        """What its size is called, e.g. ``rank``; empty where there is none to choose."""

    def sizes(self, base: BaseModel, setting: Setting) -> Sequence[int]:
        """Return the sizes to choose from, in order of the parameters that they train.

        Raises:
            UnsupportedError: The method cannot run on this model.
        """

    def build(self, base: BaseModel, setting: Setting, size: int | None) -> Built:
        """Make the base model trainable; it may be changed in place.

        Args:
            base: The base model; on the ``meta`` device while parameters are only counted.
            setting: What to fit into.
            size: One of ``sizes``; None if the method has none.

        Raises:
            UnsupportedError: The method cannot run on this model.
        """
