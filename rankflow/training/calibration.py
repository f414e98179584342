"""Measure a saved adapter's loss on the rows of a run spec, so that it is compressed by that."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader

from rankflow.adapters.base_weight import base_rows, count_base_parameters
from rankflow.adapters.sites import Site, find_sites
from rankflow.errors import ExportError, FileError, RankFlowError
from rankflow.export.calibrate import Loss, loss_scores
from rankflow.export.compress_folder import BaseReader
from rankflow.export.decompose import Decomposition
from rankflow.export.fit import check_fit
from rankflow.export.loading import without_repeated_notes
from rankflow.quiet import quiet_libraries
from rankflow.records import FloatArray
from rankflow.specs.run import ModelSpec, RunSpec
from rankflow.training.arguments import make_arguments
from rankflow.training.data import draw_rows, load_data
from rankflow.training.job import load_model
from rankflow.training.tokens import make_collator
from rankflow.training.trainer import pooled_loss

BATCHES: Final = 16


@dataclass(frozen=True, slots=True)
class Calibration:
    """An adapter on its base model, and what its loss is measured on.

    Attributes:
        model: The model, its adapter active.
        sites: The adapter's sites, by name.
        loss: From a batch to the loss.
        batches: The same ones every time.
    """

    model: PeftModel
    sites: Mapping[str, Site]
    loss: Loss
    batches: tuple[Mapping[str, Tensor], ...]

    def rows(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return base weights ``(out, in)`` by site name."""
        return {name: base_rows(self.sites[name].layer) for name in names}

    def score(self, parts: Mapping[str, Decomposition]) -> dict[str, FloatArray]:
        """Score components by site name, see ``rankflow.export.calibrate``."""
        sites = [self.sites[name] for name in parts]
        scores = loss_scores(self.model, sites, list(parts.values()), self.loss, self.batches)
        return dict(zip(parts, scores, strict=True))


def read_by_run(spec: RunSpec, adapter: Path) -> BaseReader:
    """Return what reads an adapter's base model by a run spec; it is loaded when first asked."""
    load = cache(lambda: load_calibration(spec, adapter))
    return BaseReader(
        rows=lambda names: load().rows(names),
        parameters=lambda: count_base_parameters(load().model),
        scores=lambda parts: load().score(parts),
    )


def load_calibration(spec: RunSpec, adapter: Path) -> Calibration:
    """Load the model of a run spec with a saved adapter on it, and rows of its training split.

    Args:
        spec: The run; its model, data, batch size and device count.
        adapter: The adapter's folder.

    Raises:
        SpecError: The spec names something that does not exist or does not fit.
        RankFlowError: The adapter does not fit the model, or the rows are not fit for the task.
    """
    with quiet_libraries():
        args = make_arguments(spec)
        data = load_data(spec.data, spec.model.task)
        base, splits = load_model(spec, data)
        collate = make_collator(base.tokenizer, spec.model.task)
        model = _put_on(base.model.to(args.device), adapter, spec)
    rows = draw_rows(splits["train"], BATCHES * args.train_batch_size)
    return Calibration(
        model,
        {site.name: site for site in find_sites(model)},
        _loss(model, spec.model),
        _batch(rows, args.train_batch_size, collate, args.device),
    )


def _put_on(base: Any, adapter: Path, spec: RunSpec) -> PeftModel:
    try:
        check_fit(adapter, base)
        with without_repeated_notes():
            return PeftModel.from_pretrained(base, adapter)
    except FileError:
        raise
    except (ExportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise RankFlowError(
            f"{adapter} does not fit the model '{spec.model.name}' of the run spec, or its data's "
            f"classes: {error}; name the spec that it was trained by"
        ) from error


def _loss(model: PeftModel, spec: ModelSpec) -> Loss:
    if spec.task == "sequence-classification" and spec.pooling != "model":
        return partial(pooled_loss, model, pooling=spec.pooling)
    return lambda batch: model(**batch).loss


def _batch(
    rows: Dataset, size: int, collate: Any, device: torch.device
) -> tuple[Mapping[str, Tensor], ...]:
    size = min(size, len(rows))  # batches of one size; what is left over is dropped
    loader = DataLoader(rows, batch_size=size, drop_last=True, collate_fn=collate)
    return tuple({key: value.to(device) for key, value in batch.items()} for batch in loader)
