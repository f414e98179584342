"""Adapters that train decoder layers side by side, and what their steps take."""

from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from rankflow.adapters.dora import accelerate_dora
from rankflow.bench.clock import Laps, seconds
from rankflow.bench.shapes import Decoder, Shape, quantise
from rankflow.engine import RankFlow
from rankflow.memory import peak_bytes
from rankflow.specs.budget import BudgetSpec, load_budget, resolve_steps

EVERY: Final = 8
"""Steps from one event to the next; in a real run there are more."""

SKETCHED: Final = 2
"""Steps before an event in which gradients are sketched."""


class Adapter(Enum):
    """What is compared."""

    NONE = "no adapter"
    PEFT_LORA = "PEFT LoRA"
    PEFT_DORA = "PEFT DoRA"
    PEFT_ADALORA = "PEFT AdaLoRA"
    LORA = "RankFlow LoRA"
    DORA = "RankFlow DoRA"
    HYBRID = "RankFlow hybrid"


PRESETS: Final = {Adapter.LORA: "reallocate", Adapter.HYBRID: "hybrid"}
"""The budgets of those that move ranks."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What is trained, and on how much.

    Args:
        shape: Shape of the decoder layers.
        layers: How many of them.
        tokens: Tokens of a batch.
        dtype: Type of the frozen weights; adapters are float32.
        nf4: Whether these are quantised to four bits.
        targets: PEFT's ``target_modules``.
    """

    shape: Shape
    layers: int
    tokens: int
    dtype: torch.dtype
    nf4: bool = False
    targets: str | tuple[str, ...] = "all-linear"


@dataclass(frozen=True, slots=True)
class StepTime:
    """What one step took.

    Attributes:
        kind: ``"plain"``, ``"sketched"`` or ``"event"``, a sketched step with an event behind it.
        total: Seconds, from an idle device to an idle device.
        importance: Seconds of keeping scores.
        event: Seconds of what comes after the optimizer's step.
    """

    kind: str
    total: float
    importance: float
    event: float


class Trainee:
    """An adapter in training.

    Args:
        model: What ``adapt`` returned.
        adapter: The adapter.
        rank: Its rank, or that of plain LoRA with as many parameters.
        x: Hidden states, shape ``(1, tokens, hidden)``, on the model's device.
        steps: Steps of the whole run.
        foreach: As of torch's AdamW, which by default takes all tensors at a time on a GPU.
    """

    def __init__(
        self,
        model: Any,
        adapter: Adapter,
        rank: int,
        x: Tensor,
        steps: int,
        *,
        foreach: bool | None = None,
    ) -> None:
        torch.manual_seed(0)
        self.model = model
        self._adapter = adapter
        self.flow = RankFlow(model, budget_of(adapter, rank), steps) if adapter in PRESETS else None
        trained = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, foreach=foreach) if trained else None
        self._x = x.requires_grad_()
        self._laps = Laps(x.device)
        self._taken = 0

    def step(self) -> StepTime:
        """Train for a step."""
        total = seconds(self.train, self._x.device)
        laps = self._laps.read()
        place = self._taken % EVERY
        kind = "event" if place == 0 else "sketched" if place > EVERY - SKETCHED else "plain"
        return StepTime(kind, total, *laps[1::2])

    def peak(self) -> int:
        """Train from one event past the next; return the most bytes that tensors hold at a time."""

        def train() -> None:
            for _ in range(EVERY + 1):
                self.train()

        return peak_bytes(train, self._x.device, self.held)

    @property
    def held(self) -> list[Tensor]:
        """All tensors that are there between two steps."""
        states = {} if self._optimizer is None else self._optimizer.state
        kept = [v for state in states.values() for v in state.values() if isinstance(v, Tensor)]
        return [*self.model.parameters(), *self.model.buffers(), self._x, *kept]

    def train(self) -> None:
        """Train for a step, without a look at the clock."""
        self._taken += 1
        self._laps = Laps(self._x.device)
        mark = self._laps.mark
        mark()
        self.model(self._x).backward()
        mark()
        if self.flow is not None:
            self.flow.observe()
        elif self._adapter is Adapter.PEFT_ADALORA:
            self.model.base_model.update_and_allocate(self._taken)
        mark()
        self._x.grad = None
        if self._optimizer is not None:
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        mark()
        if self.flow is not None:
            assert self._optimizer is not None
            self.flow.step(self._optimizer)
        mark()


def budget_of(adapter: Adapter, rank: int) -> BudgetSpec:
    """Return the budget of an adapter that moves ranks, with events at a benchmark's pace.

    Args:
        adapter: One of ``PRESETS``.
        rank: The rank of plain LoRA with as many parameters.
    """
    pace: dict[str, Any] = {"every": EVERY, "grow_steps": SKETCHED, "warmup": 0, "cooldown": 1}
    return load_budget(PRESETS[adapter], rank=rank, **pace)


def pace(adapter: Adapter, steps: int) -> tuple[float, float]:
    """Return the shares of a run's steps with an event, and with a sketch, in the preset itself.

    Args:
        adapter: One of ``PRESETS``.
        steps: Steps of the run.
    """
    budget = load_budget(PRESETS[adapter])
    warmup, cooldown, every = (
        resolve_steps(each, steps) for each in (budget.warmup, budget.cooldown, budget.every)
    )
    events = len(range(warmup, steps - cooldown, every)) + 1
    return events / steps, (events - 1) * budget.grow_steps / steps  # the last bears nothing


def start(
    workload: Workload, adapter: Adapter, rank: int, device: torch.device, steps: int
) -> Trainee:
    """Return an adapter that is ready to train, the same at every call.

    Args:
        workload: What is trained.
        adapter: The adapter.
        rank: Its rank, or that of plain LoRA with as many parameters.
        device: Where it runs.
        steps: Steps of the whole run.
    """
    model = adapt(workload, adapter, rank, device, steps)
    return Trainee(model, adapter, rank, draw_states(workload, device), steps)


def draw_states(workload: Workload, device: torch.device) -> Tensor:
    """Return random hidden states, shape ``(1, tokens, hidden)``."""
    size = (1, workload.tokens, workload.shape.hidden)
    return torch.randn(size, device=device, dtype=workload.dtype)


def adapt(workload: Workload, adapter: Adapter, rank: int, device: torch.device, steps: int) -> Any:
    """Return decoder layers with an adapter; see ``start``."""
    torch.manual_seed(0)
    decoder = Decoder(workload.shape, workload.layers, device, workload.dtype)
    decoder.requires_grad_(False)
    if workload.nf4:
        quantise(decoder)
    if adapter is Adapter.NONE:
        return decoder
    targets = workload.targets if workload.targets == "all-linear" else list(workload.targets)
    if adapter is Adapter.PEFT_ADALORA:
        config: LoraConfig = AdaLoraConfig(
            init_r=max(rank + 1, rank * 3 // 2),
            target_r=rank,
            lora_alpha=rank,
            tinit=0,
            tfinal=1,
            deltaT=EVERY,
            total_step=steps,
            target_modules=targets,
        )
    else:
        is_dora = adapter in (Adapter.PEFT_DORA, Adapter.DORA, Adapter.HYBRID)
        config = LoraConfig(r=rank, lora_alpha=rank, use_dora=is_dora, target_modules=targets)
    model: PeftModel = get_peft_model(decoder, config)
    if adapter is Adapter.DORA:
        accelerate_dora(model)
    return model
