"""The main job: from a run spec to a trained, measured and exported adapter."""

import math
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainingArguments

from rankflow import processes
from rankflow.adapters.sites import find_sites
from rankflow.durable import claim
from rankflow.export.inspect import inspect_adapter
from rankflow.export.options import ExportOptions
from rankflow.export.peft import export_adapter
from rankflow.integrations.huggingface import RankFlowTrainer
from rankflow.quiet import quiet_libraries
from rankflow.specs.run import RunSpec
from rankflow.training.arguments import make_arguments
from rankflow.training.interrupts import StopSignals
from rankflow.training.job import Job, prepare
from rankflow.training.progress import ProgressBar
from rankflow.training.result import RunResult, print_result
from rankflow.training.resuming import find_start, read_result
from rankflow.training.run_folder import (
    ADAPTER_FOLDER,
    METRICS_FILE,
    check_folder,
    start_folder,
    write_json,
)
from rankflow.training.trainer import make_trainer, start_training


def train(spec: RunSpec, *, console: Console, resume: bool = False) -> RunResult:
    """Train an adapter under its budget, judge it, export it, and tell.

    An earlier run in the output folder is moved aside. With ``resume``, or with
    ``resume_from_checkpoint`` in ``[train]``, the run goes on in its folder instead, bit for bit as
    if it had never stopped. On SIGTERM and SIGINT it saves a checkpoint and exits, see
    ``rankflow.training.interrupts``.

    Args:
        spec: The run, from ``rankflow.specs.run.load_run``.
        console: Where to draw.
        resume: Whether to go on from the newest checkpoint that is as it was written; a run that
            has none begins, and one that has ended is told again.

    Raises:
        RankFlowError: Anything about the run is wrong; found before the first step.
        CheckpointError: It cannot be resumed.
    """
    folder = Path(spec.train["output_dir"])
    check_folder(folder)
    with quiet_libraries():
        args = make_arguments(spec)  # they bring the processes of a job together
    if not processes.is_first():
        console = Console(quiet=True)
    with (
        claim(folder) if processes.is_first() else nullcontext(),
        StopSignals(console) as signals,
        quiet_libraries(),
    ):
        start = find_start(folder, spec, console) if resume else None
        result = read_result(folder) if resume else None
        processes.wait_for_all("looking at the run's folder")
        if result is None:
            result = _run(spec, args, console, signals, start)
    print_result(result, spec, console)
    return result


def _run(
    spec: RunSpec,
    args: TrainingArguments,
    console: Console,
    signals: StopSignals,
    start: Path | None,
) -> RunResult:
    began = time.perf_counter()
    folder = Path(spec.train["output_dir"])
    if start is not None:
        args.resume_from_checkpoint = str(start)
    with args.main_process_first():  # the others find the rows in its cache
        job = prepare(spec, args, console)
    trainer = make_trainer(spec, job, args)
    trainer.add_callback(signals)
    if args.resume_from_checkpoint is None and processes.is_first():
        aside = start_folder(folder, spec)
        if aside is not None:
            console.print(
                f"output      an earlier run moved to {aside}", highlight=False, soft_wrap=True
            )
    trainer.remove_callback(PrinterCallback)  # the console tells what there is to tell
    baseline = job.baseline or _measure_base_model(trainer, job)
    _train_under_bar(trainer, console)
    metrics = _measure(trainer, job)

    def conclude() -> RunResult | None:
        if not processes.is_first():
            return None
        adapter = _export(trainer, metrics, folder / ADAPTER_FOLDER, job.tokenizer)
        seconds = time.perf_counter() - began
        result = _sum_up(trainer, job, folder, adapter, baseline, metrics, seconds)
        record = asdict(result) | {"folder": str(folder), "adapter": str(adapter)}
        write_json(folder / METRICS_FILE, record)
        return result

    what = "exporting the adapter"
    concluded = processes.from_first(processes.in_all(conclude, what), what)
    assert concluded is not None  # the first process has concluded
    return concluded


def _train_under_bar(trainer: RankFlowTrainer, console: Console) -> None:
    bar = ProgressBar(console, trainer.rankflow)
    trainer.add_callback(bar)
    try:
        start_training(trainer, trainer.args.resume_from_checkpoint)
    finally:
        bar.close()


def _measure_base_model(trainer: RankFlowTrainer, job: Job) -> dict[str, float]:
    with job.model.disable_adapter():
        return _measure(trainer, job)


def _measure(trainer: RankFlowTrainer, job: Job) -> dict[str, float]:
    """Return accuracy and nll of a classifier, loss and perplexity of a language model."""
    split = job.data.judged_split
    if split is None:
        return {}
    measured = trainer.evaluate(job.splits[split], metric_key_prefix=split)
    if job.data.labels:
        return {name: measured[f"{split}_{name}"] for name in ("accuracy", "nll")}
    loss = measured[f"{split}_loss"]
    return {"loss": loss, "perplexity": math.exp(loss)}


def _export(
    trainer: RankFlowTrainer,
    metrics: dict[str, float],
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> Path:
    flow = trainer.rankflow.flow
    assert flow is not None  # training is over
    options = ExportOptions(tokenizer=tokenizer)
    return export_adapter(trainer.model, path, facts=flow.facts(metrics), options=options)


def _sum_up(
    trainer: RankFlowTrainer,
    job: Job,
    folder: Path,
    adapter: Path,
    baseline: dict[str, float],
    metrics: dict[str, float],
    seconds: float,
) -> RunResult:
    flow = trainer.rankflow.flow
    assert flow is not None  # training is over
    trainable = sum(p.numel() for p in job.model.parameters() if p.requires_grad)
    return RunResult(
        folder=folder,
        adapter=adapter,
        split=job.data.judged_split,
        baseline=baseline,
        metrics=metrics,
        spent=flow.spent,
        target=flow.resolved.target,
        stored=inspect_adapter(adapter).parameters,
        head=trainable - flow.spent,
        classes=len(job.data.labels),
        ranks=flow.ranks,
        magnitudes=flow.magnitudes,
        costs={site.name: site.parameters for site in find_sites(job.model, "default")},
        events=len(flow.history),
        seconds=seconds,
    )
