"""Run one cell: build, train, judge, measure."""

import gc
import traceback
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from transformers import PrinterCallback, TrainingArguments, set_seed

from rankflow.ablation.measures.latency import measure_latency
from rankflow.ablation.measures.memory import measure_peak_bytes
from rankflow.ablation.methods.method import Built, Method, Setting, UnsupportedError
from rankflow.ablation.methods.registry import find_method
from rankflow.ablation.provenance import digest_cell, trace
from rankflow.ablation.records import (
    Cell,
    CellResult,
    Parameters,
    RankHistory,
    RankMoment,
)
from rankflow.ablation.sizing import choose_size, count_trainable, is_head
from rankflow.ablation.trainer import CellTrainer
from rankflow.ablation.workload import Autocast, Workload, autocast_of, open_workload
from rankflow.checkpoint import find_checkpoint
from rankflow.engine import RankFlow
from rankflow.errors import BudgetError
from rankflow.quiet import quiet_libraries
from rankflow.specs.ablation import AblationSpec
from rankflow.training.adapter import add_adapter
from rankflow.training.run_budget import count_steps

_ROUNDS: Final = 9  # of interleaved forward passes


@dataclass(frozen=True, slots=True)
class Order:
    """What a worker is asked to do.

    Attributes:
        cell: The cell.
        learned: The ranks that it retrains; None for most methods.
        is_measured: Whether latency and memory are measured too.
        folder: Where it keeps the checkpoints that ``[train]`` asks for, to go on from after a
            kill; None for a temporary folder.
    """

    cell: Cell
    learned: RankHistory | None = None
    is_measured: bool = False
    folder: Path | None = None


@dataclass
class CellRunner:
    """Runs the cells of an ablation, one after the other, in one process.

    Attributes:
        spec: The ablation.
        threads: Threads of a CPU computation; results depend on them in the last digits.
    """

    spec: AblationSpec
    threads: int = 1
    _workloads: dict[str, Workload] = field(default_factory=dict)
    _rank_costs: dict[str, int] = field(default_factory=dict)

    def run(self, order: Order) -> CellResult:
        """Run a cell; whatever goes wrong in it is its result."""
        torch.set_num_threads(self.threads)
        AcceleratorState._reset_state(reset_partial_state=True)  # the last task's precision
        cell = order.cell
        method = find_method(self.spec.variant(cell.method))
        digest = digest_cell(self.spec, cell)
        try:
            with quiet_libraries(), _workplace(order.folder) as folder:
                return self._run(order, method, digest, Path(folder))
        except (UnsupportedError, BudgetError) as error:
            return CellResult(cell, "unsupported", trace(digest), reason=str(error))
        except Exception as error:  # one cell must not stop the others
            last = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
            return CellResult(cell, "failed", trace(digest), reason=reason)
        finally:
            gc.collect()

    def parameters_of(self, task: str, budget: str) -> int:
        """Return a budget in parameters on a task."""
        point = self.spec.budget(budget)
        if point.params is not None:
            return point.params
        assert point.rank is not None  # one of the two is set
        return int(point.rank * self._rank_cost(task))

    def setting_of(self, cell: Cell, learned: RankHistory | None) -> Setting:
        """Return what the method of a cell has to fit into."""
        workload = self.workload(cell.task)
        task = self.spec.task(cell.task)
        parameters = self.parameters_of(cell.task, cell.budget)
        alpha = self.spec.adapter.get("lora_alpha", LoraConfig.lora_alpha)
        arguments = self._arguments(cell, Path("unused"))
        return Setting(
            model=workload.model,
            adapter={**self.spec.adapter, "lora_alpha": alpha * cell.scaling},
            parameters=parameters,
            steps=count_steps(workload.rows(cell.training_seed), arguments),
            seed=cell.training_seed,
            options=self.spec.variant(cell.method).config,
            rank=parameters / self._rank_cost(task.name),
            max_length=max(
                (part.max_length for part in (task.data, task.forgetting) if part is not None),
                default=0,
            ),
            learned=learned,
        )

    def workload(self, task: str) -> Workload:
        """Return a task's rows and model, read once."""
        if task not in self._workloads:
            self._workloads[task] = open_workload(self.spec.task(task))
        return self._workloads[task]

    def _run(self, order: Order, method: Method, digest: str, folder: Path) -> CellResult:
        cell = order.cell
        workload = self.workload(cell.task)
        setting = self.setting_of(cell, order.learned)
        size = None
        if method.size_name:
            size = choose_size(method, workload.build_meta, setting).size
        arguments = self._arguments(cell, folder)
        set_seed(cell.training_seed)  # a new head is drawn at random
        base = workload.load_base(cell.training_seed, quantised=method.quantised)
        base.model.to(arguments.device)
        head = base.full_modules
        set_seed(cell.training_seed)  # the adapter is the same whatever the head took
        built = method.build(base, setting, size)
        trainer = CellTrainer(
            built=built,
            args=arguments,
            head=head,
            head_rate=self.spec.head_rate,
            pooling=workload.pooling,
            train_dataset=workload.rows(cell.training_seed),
            data_collator=workload.collate,
        )
        trainer.remove_callback(PrinterCallback)
        # The state of a method's own callbacks, such as AdaLoRA's scores, is in no checkpoint.
        found = None if built.callbacks else find_checkpoint(folder).path
        trainer.train(resume_from_checkpoint=None if found is None else str(found))
        parameters = _finish(built, trainer, head, setting.parameters, size)
        flow = trainer.flow
        ranks = None if flow is None else history_of(flow)
        autocast = autocast_of(self.spec.task(cell.task).train, arguments.device)
        metrics = workload.judge(built.model, cell.split, autocast)
        result = CellResult(
            cell,
            "done",
            trace(digest),
            metrics=metrics | workload.judge_ranks(ranks, cell.training_seed),
            parameters=parameters,
            seconds_per_step=trainer.clock.mean_wall,
            cpu_seconds_per_step=trainer.clock.mean_cpu,
            ranks=ranks,
        )
        if cell.split == "test":
            forgetting = workload.measure_forgetting(built.model, autocast)
            result = replace(result, forgetting=forgetting)
        if not order.is_measured:
            return result
        return self._measured(result, workload, built, trainer, autocast)

    def _measured(
        self,
        result: CellResult,
        workload: Workload,
        built: Built,
        trainer: CellTrainer,
        autocast: Autocast,
    ) -> CellResult:
        """Add memory and latency."""
        cell, device = result.cell, trainer.args.device
        batch = {
            key: value.to(device) for key, value in workload.sample(cell.training_seed).items()
        }
        peak = measure_peak_bytes(
            built.model, lambda: trainer.compute_loss(built.model, dict(batch))
        )
        base = workload.load_base(cell.training_seed, quantised=False).model.to(device)
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        with autocast():
            latency = measure_latency(base, built, inputs, rounds=_ROUNDS)
        return replace(result, peak_bytes=peak, latency=latency)

    def _arguments(self, cell: Cell, folder: Path) -> TrainingArguments:
        defaults: dict[str, Any] = {
            "report_to": "none",
            "logging_strategy": "no",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": not torch.cuda.is_available(),
            "dataloader_pin_memory": torch.cuda.is_available(),
            "remove_unused_columns": False,  # the rows hold what the model takes, and no more
        }
        ours = {"output_dir": str(folder), "seed": cell.training_seed, "learning_rate": cell.rate}
        return TrainingArguments(**defaults | self.spec.task(cell.task).train | ours)

    def _rank_cost(self, task: str) -> int:
        """Return the parameters of plain LoRA of rank 1 on a task's model."""
        if task not in self._rank_costs:
            workload = self.workload(task)
            base = workload.build_meta()
            head = base.full_modules
            model = add_adapter(base, workload.model, {**self.spec.adapter, "r": 1})
            self._rank_costs[task] = count_trainable(model, head)[0]
        return self._rank_costs[task]


def _workplace(folder: Path | None) -> AbstractContextManager[str | Path]:
    return TemporaryDirectory() if folder is None else nullcontext(folder)


def history_of(flow: RankFlow) -> RankHistory:
    """Return how the ranks of a run moved, from its start to its end."""
    sites = tuple(flow.ranks)
    index = {site: i for i, site in enumerate(sites)}

    def moment(step: int, spent: int, ranks: dict[str, int], on: dict[str, bool]) -> RankMoment:
        return RankMoment(
            step,
            spent,
            tuple(ranks[site] for site in sites),
            tuple(index[site] for site, is_on in on.items() if is_on),
        )

    if not flow.history:
        return RankHistory(sites, (moment(0, flow.spent, flow.ranks, flow.magnitudes),))
    first = flow.history[0]
    return RankHistory(
        sites,
        (
            RankMoment(0, first.spent_before, tuple(first.ranks_before[s] for s in sites)),
            *(moment(e.step, e.spent, e.ranks, e.magnitudes) for e in flow.history),
        ),
    )


def _peak(flow: RankFlow) -> int:
    return max([flow.spent, *(max(event.spent_before, event.spent) for event in flow.history)])


def _finish(
    built: Built, trainer: CellTrainer, head: tuple[str, ...], budget: int, size: int | None
) -> Parameters:
    """Do what a method does once training is over, and count."""
    peak, head_parameters = count_trainable(built.model, head)
    if trainer.flow is not None:
        peak = _peak(trainer.flow)
    if built.finish is not None:
        built.finish()
    final = built.final() if built.final is not None else count_trainable(built.model, head)[0]
    return Parameters(budget, final, peak, _stored(built, head), head_parameters, size)


def _stored(built: Built, head: tuple[str, ...]) -> int:
    """Count what the files of the adaptation hold: PEFT's, or what trains where PEFT has no part.

    A LoRA site that is off is left out of an export; PEFT's files of the live model hold it.
    """
    model = built.model
    if not isinstance(model, PeftModel):
        return count_trainable(model, head)[0]
    with warnings.catch_warnings():
        # Sites that AdaLoRA has emptied: counted here, and loaded nowhere.
        warnings.filterwarnings("ignore", "Adapter .* have invalid shape")
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return sum(value.numel() for name, value in state.items() if not is_head(name, head))
