"""From a run spec to everything that training needs, with every check before the first step."""

from dataclasses import dataclass

from datasets import DatasetDict
from peft import PeftModel
from transformers import set_seed

from rankflow.specs.run import ModelSpec, RunSpec
from rankflow.training.adapter import add_adapter
from rankflow.training.baseline import measure_frozen_encoder
from rankflow.training.data import TaskData, load_data
from rankflow.training.models import BaseModel, check_length, load_base_model
from rankflow.training.pooling import TokenPooling
from rankflow.training.tokens import Collator, make_collator, tokenize


@dataclass(frozen=True, slots=True)
class Job:
    """A run, ready to train.

    Attributes:
        data: The rows as text.
        splits: The rows as tokens.
        base: The base model, now under the adapter.
        model: The model with its adapter.
        collate: Pads rows into a batch.
        baseline: Metrics of the frozen encoder on the judged split; empty for language models,
            and where no rows are held out.
    """

    data: TaskData
    splits: DatasetDict
    base: BaseModel
    model: PeftModel
    collate: Collator
    baseline: dict[str, float]


def prepare(spec: RunSpec) -> Job:
    """Load data and model, measure the frozen encoder, and put the adapter on.

    Raises:
        SpecError: The spec names something that does not exist or does not fit.
        RankFlowError: Rows, checkpoint or tokenizer are not fit for the task.
    """
    task = spec.model.task
    data = load_data(spec.data, task)
    set_seed(spec.seed)  # the head is drawn at random
    base = load_base_model(spec.model, data.labels)
    check_length(spec.data.max_length, base.model.config)
    splits = tokenize(data.splits, base.tokenizer, task, spec.data.max_length)
    collate = make_collator(base.tokenizer, task)
    baseline: dict[str, float] = {}
    if data.labels and data.judged_split is not None:
        baseline = measure_frozen_encoder(
            base.model,
            splits,
            data.judged_split,
            collate,
            feature_pooling(spec.model),
            len(data.labels),
        )
    model = add_adapter(base, spec.model, spec.adapter)
    return Job(data, splits, base, model, collate, baseline)


def feature_pooling(spec: ModelSpec) -> TokenPooling | None:
    """How the frozen baseline pools: as the task does, by the mean where the model decides."""
    if spec.task == "token-classification":
        return None
    return "cls" if spec.pooling == "cls" else "mean"
