"""Export the whole model with the adapter in its weights, for programs that know no adapters."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rankflow.adapters.base_weight import dense_weight
from rankflow.durable import new_folder
from rankflow.errors import ExportError
from rankflow.export.change import effective_rows, in_layout
from rankflow.export.check import make_report
from rankflow.export.copies import copy_base, copy_in_type, copy_merged
from rankflow.export.job import ExportJob
from rankflow.export.probe import (
    Probe,
    Unprobed,
    as_exported,
    compare,
    outputs_of,
    probe_model,
    tolerance,
)
from rankflow.export.report import write_report
from rankflow.export.tokenizer import find_tokenizer

_SHARD = "5GB"


def write_merged(job: ExportJob) -> Path:
    """Write a stock transformers model, sharded, with its tokenizer if that is known.

    The merge is a copy; the live weights are only read. It is compared with the live model before
    its weights are rounded to another type, and again after the files were loaded.

    Raises:
        ExportError: The base is quantised or not of transformers, or what was written does not
            compute what the live model computes.
    """
    live = job.model.get_base_model()
    _check_base(job, live)
    tokenizer = job.options.tokenizer or find_tokenizer(job.base_model)
    with as_exported(job.model, job.adapter_name):
        probe = _probe(job, live)
        merged = _merge(job)
        _check_merge(merged, live, probe)
        untouched = outputs_of(copy_base(job.model), probe.inputs)
        if job.options.dtype is not None:
            merged = copy_in_type(merged, getattr(torch, job.options.dtype))
        with new_folder(job.path) as folder:
            merged.save_pretrained(folder, max_shard_size=job.options.max_shard_size or _SHARD)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            loaded = type(live).from_pretrained(folder, dtype="auto").eval()
            _check_weights(merged, loaded)
            if tokenizer is not None:
                _check_tokenizer(tokenizer, folder)
            limit = tolerance(live, loaded)
            report = make_report(
                job,
                folder,
                probe,
                outputs_of(loaded.to(next(live.parameters()).device), probe.inputs),
                untouched,
                checked_by=f"transformers.{type(live).__name__}.from_pretrained",
                limit=limit,
            )
            write_report(folder, report)
    return job.path


def _check_base(job: ExportJob, live: nn.Module) -> None:
    if not isinstance(live, PreTrainedModel):
        raise ExportError(
            f"the base is a {type(live).__name__}, and merged writes models of transformers; call "
            "model.merge_and_unload() and save that by its own means"
        )
    for site in job.sites:
        weight = site.layer.get_base_layer().weight
        if dense_weight(site.layer) is not weight:
            raise ExportError(
                f"site {site.name!r} has a quantised weight, into which a merge would round the "
                "adapter away; load the base model in full precision, put the exported adapter on "
                "it, and export that as merged"
            )


def _probe(job: ExportJob, live: nn.Module) -> Probe:
    probe = probe_model(live, job.options.inputs)
    if isinstance(probe, Unprobed):
        raise ExportError(
            f"a merged model must be compared: {probe.reason} as ExportOptions.inputs"
        )
    return probe


def _merge(job: ExportJob) -> PreTrainedModel:
    weights = {}
    for site in job.sites:
        weight = site.layer.get_base_layer().weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        rows = effective_rows(site, wide)
        weights[id(site.layer)] = in_layout(site, rows).to(weight.device, weight.dtype)
    merged = copy_merged(job.model, job.adapter_name, weights)
    _untie(merged)
    return merged


def _untie(merged: PreTrainedModel) -> None:
    """Let a model whose embeddings were tied save both, if the merge made them differ."""
    inputs, outputs = merged.get_input_embeddings(), merged.get_output_embeddings()
    if outputs is not None and inputs is not None and outputs.weight is not inputs.weight:
        merged.config.get_text_config().tie_word_embeddings = False
        merged.config.tie_word_embeddings = False


def _check_merge(merged: nn.Module, live: nn.Module, probe: Probe) -> None:
    found = compare(probe.outputs, outputs_of(merged, probe.inputs))
    if not found.relative <= tolerance(live):
        raise ExportError(
            f"the merged model differs from the live one by {found.relative:.2g} of the largest "
            f"output, and rounding explains {tolerance(live):g}; are two layers one weight?"
        )


def _check_weights(merged: nn.Module, loaded: nn.Module) -> None:
    """Check that every weight came back bit by bit; a type that transformers widens is the same."""
    found = loaded.state_dict()
    for name, tensor in merged.state_dict().items():
        if name not in found or not torch.equal(found[name].cpu().double(), tensor.cpu().double()):
            raise ExportError(f"the weight {name!r} that transformers loads is not the merged one")


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(folder)
    if loaded.get_vocab() != tokenizer.get_vocab():
        raise ExportError("the tokenizer that transformers loads has another vocabulary")
    if loaded.chat_template != tokenizer.chat_template:
        raise ExportError("the tokenizer that transformers loads has another chat template")
