"""RankFlow: watches a model train, and moves its adapter parameters to where they earn most.

One event is a straight line, and no call returns upward::

    tracker.survey()    what is every component worth?               -> ComponentTable
    scheduler.plan()    which stay, and where are new ones born?     -> RankPlan
    resizer.resize()    parameters and optimizer state
    tracker.follow()    scores follow the components
    sinks               whoever wants to know                        <- RankEvent

All but the sinks is one transaction: whatever interrupts it, lack of memory or a keyboard, leaves
model, optimizer and engine as they were. What a sink raises reaches the caller, and the event
stands.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from peft import PeftModel
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.optim import Optimizer

from rankflow import dem, processes, surgery
from rankflow.adapters.base_weight import count_base_parameters
from rankflow.adapters.gating import check_untrained, convert, start_gates
from rankflow.adapters.norm_cache import Epoch
from rankflow.adapters.savepoint import Savepoint, renew, undone_on_error
from rankflow.adapters.sites import Site, find_sites, magnitudes_on
from rankflow.adapters.stacked import warn_of_stacked_weights
from rankflow.adapters.state_dicts import translate_state_dicts
from rankflow.adapters.stock import check_trainable
from rankflow.adapters.vera import draw_matrices, share_matrices, start_vectors
from rankflow.budgeting import resolve_budget
from rankflow.errors import (
    BudgetError,
    CheckpointError,
    RankFlowError,
    SpecError,
    SurgeryError,
)
from rankflow.eventing import describe
from rankflow.export.card import AdapterFacts
from rankflow.fairstart import FairStart
from rankflow.growing import Growth
from rankflow.importance.bad_steps import MAX_BAD_STEPS, BadSteps
from rankflow.importance.finite import check_weights
from rankflow.importance.gradients import StepGradients
from rankflow.records import ComponentTable, RankEvent, RankPlan
from rankflow.resizing.choose import choose_resizer
from rankflow.specs.budget import BudgetSpec
from rankflow.tracking import Tracker

_EVENTS = TypeAdapter(list[RankEvent])


class RankFlow:
    """Makes the ranks of a PEFT LoRA or DoRA model follow a budget while it trains.

    Call ``observe`` between backward and the optimizer's step, and ``step`` after it::

        loss.backward()
        flow.observe()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        event = flow.step(optimizer)

    At construction the sites are resized evenly to the start budget, in place, so an optimizer may
    be made before or after, as long as it has not stepped. The model stays a stock ``PeftModel``.

    A budget of gated or VeRA components puts gates on the adapter, which must be new, and draws its
    factors afresh; an optimizer made before needs ``attach`` before its first step then. The scale
    stays PEFT's ``alpha / r``, whatever the ranks.

    Forward, backward and clipping may be a CUDA graph that is replayed, as in
    ``examples/cuda_graphs.py``. An event puts other parameters in place, so capture again whenever
    ``step`` returns one. ``observe`` and the optimizer's step stay outside, and where newborns
    point is not sketched in a replay: set ``grow = "orthogonal"``. A model under ``torch.compile``
    needs nothing: what an event changes is compiled anew.

    A model under FSDP2 (``torch.distributed.fsdp.fully_shard``), where no tensor can change its
    shape, is steered through slots: ``LoraConfig.r`` is the largest rank of a site there, and what
    holds no component is zero. Make the optimizer and this after ``fully_shard``, in all processes.

    Args:
        model: A ``peft.PeftModel`` with a LoRA or DoRA adapter.
        budget: The budget, from ``load_budget``.
        total_steps: Optimizer steps of the whole run.
        adapter_name: The adapter to steer; others are left alone.
        accelerate: Whether DoRA sites compute by the fast forward of ``accelerate_dora``.
        sinks: Called with every event, in order.
        resume: What ``state_dict`` returned in the run that goes on; the sites are then brought to
            the ranks that they had, and nothing happens to those that have them already.
        max_bad_steps: Steps in a row whose loss or gradients are not finite that stop the run. None
            of them counts for the scores. The default leaves a gradient scaler, which starts at
            65536 and halves, room to come down to 1.

    Raises:
        SiteError: The model has no site, or one that cannot be steered.
        BudgetError: The budget does not fit the sites or the steps.
        RankFlowError: The model is spread over devices in a way, or under a budget, that is not
            followed.
        CheckpointError: ``resume`` belongs to another model, budget or length of run.
    """

    def __init__(
        self,
        model: PeftModel,
        budget: BudgetSpec,
        total_steps: int,
        adapter_name: str = "default",
        *,
        accelerate: bool = True,
        sinks: Sequence[Callable[[RankEvent], None]] = (),
        resume: dict[str, Any] | None = None,
        max_bad_steps: int = MAX_BAD_STEPS,
    ) -> None:
        _check_arguments(budget, total_steps)
        _check_limit(max_bad_steps)
        self.model = model
        self.budget = budget
        self.adapter_name = adapter_name
        self.history: list[RankEvent] = []
        self.sinks = list(sinks)
        self._optimizer: Optimizer | None = None
        self._sites = find_sites(model, adapter_name)
        self._resizer = choose_resizer(model, adapter_name, self._sites, budget)
        check_trainable(model, adapter_name, self._sites)
        warn_of_stacked_weights(model)
        what = "attaching RankFlow to the model"
        with (
            undone_on_error(what, self._sites, model=model),
            self._resizer.undone_on_error(None, what),
        ):
            self._set_up(total_steps, accelerate, resume, max_bad_steps)

    def _set_up(
        self, total_steps: int, accelerate: bool, resume: dict[str, Any] | None, max_bad_steps: int
    ) -> None:
        model, budget = self.model, self.budget
        is_new = self._sites[0].gate is None
        if is_new:
            if budget.components != "factors" and resume is None:
                check_untrained(self._sites)
            convert(self._sites, budget.components)
        self.resolved = self._resizer.resolve(
            [
                site.describe(*budget.bounds_of(site.name), magnitude=budget.magnitude)
                for site in self._sites
            ],
            partial(
                resolve_budget,
                budget,
                total_steps=total_steps,
                base_parameters=count_base_parameters(model),
                bytes_per_parameter=self._sites[0].A.element_size(),
            ),
        )
        if budget.components == "vera":
            largest = max(info.max_rank for info in self.resolved.sites)
            share_matrices(self._sites, draw_matrices(self._sites, largest, budget.seed))
        for site in self._sites:
            translate_state_dicts(site.layer, self.adapter_name)
            if accelerate and site.magnitude_slot is not None:
                self._resizer.accelerate(site)
        self._steps = 0
        self._observed = 0
        self._limit = self.resolved.start
        self._accept = torch.ones((), dtype=torch.bool, device=self._sites[0].A.device)
        self._gradients = StepGradients(self._sites, _trained_beside(model, self._sites))
        self._bad_steps = BadSteps(self._sites, max_bad_steps)
        self._fair_start = FairStart(self._sites)
        self._growth = Growth(budget, self._sites, self.resolved)
        if resume is None:
            ranks, magnitudes = self.resolved.start_ranks, self.resolved.start_magnitudes
            newborns = self._growth.newborns(0)
            self._resizer.begin(self.resolved.sites, ranks, magnitudes, newborns)
            self._track_afresh()
            if is_new:
                self._draw_components()
            self._look_ahead()
        else:
            self._restore(resume)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each site now, by site name."""
        return {site.name: site.rank for site in self._sites}

    @property
    def magnitudes(self) -> dict[str, bool]:
        """Whether each site trains its magnitude now; empty unless they are budgeted."""
        if self.budget.magnitude != "budgeted":
            return {}
        return {site.name: site.magnitude is not None for site in self._sites}

    @property
    def spent(self) -> int:
        """Trainable adapter parameters now: A, B, gates and magnitudes of all sites."""
        return sum(site.parameters for site in self._sites)

    @property
    def limit(self) -> int:
        """Trainable adapter parameters that the budget allows, as of the last event."""
        return self._limit

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.resolved.scheduler.total_steps

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return self._steps

    def observe(self, *, loss_scale: Tensor | float = 1.0, loss: Tensor | None = None) -> None:
        """Fold this step's gradients into the scores; does not wait for the device.

        Call it when the gradients of the whole step are complete, accumulated, reduced and clipped:
        after ``backward`` and clipping, before ``optimizer.step``. Clipping is undone; a step whose
        loss or gradients are not finite does not count, and too many in a row stop the run. Under
        FSDP2 a process looks at the gradients that it holds, and decides about these alone.

        Args:
            loss_scale: Factor of a gradient scaler that was on the loss in ``backward`` and is off
                the gradients now.
            loss: Loss of the step, of any shape; the sum of micro-batches will do. A loss that is
                not finite may have finite gradients. In a job of several processes it is not
                looked at: each has its own, and all must decide alike.

        Raises:
            DivergenceError: ``max_bad_steps`` steps in a row were bad; the message names the first
                of them, and the site where numbers ceased to be finite.
            RankFlowError: No adapter parameter has a gradient, or processes of the job have
                different ones.
        """
        was_averaged = self._resizer.check_gradients(self._steps + 1)
        reading = self._gradients.read(loss_scale)
        # Gradients that are averaged by hand after backward were seen before that.
        unclip = reading.unclip if was_averaged else torch.ones_like(reading.unclip)
        is_finite = _is_finite(loss, like=reading.accept)
        self._accept = reading.accept & is_finite
        if not self.resolved.is_static:
            self._tracker.observe(unclip, self._accept)
            self._growth.sketch.observe(self._accept, loss_scale)
        self._observed += 1
        step = self._steps + 1
        self._bad_steps.count(step, reading, is_finite, self._gradients.parameters)

    def mute_bad_step(self) -> None:
        """Set all gradients of the step that ``observe`` has seen to zero if it does not count.

        Then it leaves the weights finite: the optimizer takes the step that it takes without a
        gradient. It does not wait for the device. With a gradient scaler leave it out: that skips
        the step by itself, and has to see why. Under FSDP2 a process mutes what it holds.
        """
        self._gradients.mute(self._accept)

    def check_finite(self) -> None:
        """Check that all weights that the run trains are finite; waits for the device.

        Raises:
            DivergenceError: One is not; the message names its site.
        """
        self._resizer.everywhere(self._check_weights, "checking the weights")

    def _check_weights(self) -> None:
        check_weights(
            self._gradients.parameters,
            f"training has diverged by step {self._steps}: go on from an earlier checkpoint, with "
            "a lower learning rate, or in bf16 instead of fp16",
        )

    def penalty(self) -> Tensor:
        """Return what the budget's regulariser adds to the loss of a step, a scalar.

        In a loop of your own, add it to the loss; under gradient accumulation, to the loss of one
        micro-batch. It is 0 if the budget has none, and once pruning has ended.
        """
        if not self._is_regularised:
            return torch.zeros((), device=self._sites[0].A.device)
        return self.budget.dem * dem.penalty(self._sites, self._start_components)

    def regularise(self) -> None:
        """Add the gradient of ``penalty`` to this step's gradients, instead of adding it to a loss.

        Call it after ``observe``, so that the scores see the loss alone. The addition is not
        clipped.
        """
        if self._is_regularised:
            dem.add_gradient(self._sites, self._start_components, self.budget.dem)

    def step(self, optimizer: Optimizer) -> RankEvent | None:
        """Count one optimizer step, and reallocate if an event is due.

        Call it after ``optimizer.step``, before or after ``zero_grad``.

        Args:
            optimizer: The optimizer that trains the adapter.

        Returns:
            What the event did, or None if none was due.

        Raises:
            SurgeryError: The optimizer does not train the adapter, or has state that cannot be
                resized, or the event failed, say for lack of memory. All is as it was before the
                event; training may go on, and the next due step tries again.
            DivergenceError: An event is due, and weights or scores are not finite.
            SiteError: An event is due and the adapter is not active.
            RankFlowError: An event is due and ``observe`` was never called.
        """
        self.attach(optimizer)
        Epoch.count()
        self._steps += 1
        if self.resolved.is_static:
            return None
        event = None
        if self.resolved.scheduler.is_due(self._steps):
            self._check_observed()
            event = self._reallocate(self._steps)
        try:
            self._look_ahead()
        finally:
            self._publish(event)
        return event

    def _check_observed(self) -> None:
        if self._observed == 0:
            raise RankFlowError(
                f"a reallocation is due after step {self._steps}, but observe() saw no gradients; "
                "call flow.observe() after loss.backward() and before optimizer.step()"
            )

    def attach(self, optimizer: Optimizer) -> None:
        """Name the optimizer before its first step; ``step`` does so otherwise.

        It matters in a resumed run, where young components may need their fair start at once, and
        for an optimizer that was made before the engine put gates on the components.

        Args:
            optimizer: The optimizer that trains the adapter.

        Raises:
            SurgeryError: The optimizer does not train the adapter, or has trained it at other
                ranks.
        """
        inner = _unwrap(optimizer)
        if inner is self._optimizer:
            return
        for site in self._sites:
            surgery.adopt_gate(site, inner)
        held = {id(p) for group in inner.param_groups for p in group["params"]}
        for site in self._sites:
            if not {id(parameter) for parameter in site.trained} <= held:
                raise SurgeryError(
                    f"the optimizer does not train the adapter of site {site.name!r}; build it "
                    "from the model's trainable parameters, and pass flow.step() that optimizer"
                )
            surgery.check_state(site, inner)
        self._optimizer = inner
        self._fair_start.attach(inner)

    def finish(self) -> RankEvent | None:
        """Meet the target budget now, if the run ends above it (say by early stopping).

        Returns:
            What had to be done, or None if the target is met already.

        Raises:
            DivergenceError: The weights are not finite.
            SiteError: Something has to be done and the adapter is not active.
        """
        self.check_finite()
        if self.spent <= self.resolved.target:
            self._limit = min(self._limit, self.resolved.target)
            return None
        event = self._reallocate(self.total_steps)
        self._publish(event)
        return event

    def facts(self, metrics: Mapping[str, float] | None = None) -> AdapterFacts:
        """Return what an exported adapter should say of this run.

        Args:
            metrics: What was measured, by name.
        """
        return AdapterFacts(
            spent=self.spent,
            target=self.resolved.target,
            steps=self._steps,
            budget=self.budget.model_dump(),
            metrics=dict(metrics or {}),
        )

    def close(self) -> None:
        """Remove all hooks on gradients and optimizer; the model trains on at its ranks."""
        self._gradients.close()
        self._fair_start.close()
        self._growth.sketch.close()
        self._bad_steps.close()
        self._resizer.close()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs, as plain values and tensors.

        In a job of several processes all of them have to call it; one of them may save it.
        """
        self._growth.sketch.average("saving the state of RankFlow")
        return {
            "budget": self.budget.model_dump(),
            "total_steps": self.total_steps,
            "ranks": self.ranks,
            "steps": self._steps,
            "observed": self._observed,
            "bad_steps": self._bad_steps.in_a_row,
            "limit": self._limit,
            "magnitudes": magnitudes_on(self._sites).tolist(),
            "young": self._fair_start.lived(),
            **self._resizer.state(),
            **self._tracker.state(),
            "scorer": self._tracker.tensors(),
            "sketch": {key: value.clone() for key, value in self._growth.sketch.state().items()},
            "gated": {k: factor.detach().clone() for k, factor in self._gated_factors().items()},
            "history": _EVENTS.dump_python(self.history, mode="json"),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict``, resizing the sites in place to the ranks that they had.

        The values of the weights and of the optimizer's state are not in here: load them
        afterwards, as in any resumed run. Gates and their B are, since a stock state dict holds
        their product alone; loading it afterwards leaves them as they are.

        Args:
            state: What ``state_dict`` returned, in a run of the same budget on the same sites.

        Raises:
            CheckpointError: The state belongs to another model, budget or length of run.
            SiteError: The adapter is not active.
            SurgeryError: There is no memory for it; all is as it was.
        """
        with self._undone_on_error("bringing the model to a saved state"):
            self._restore(state)

    def _restore(self, state: dict[str, Any]) -> None:
        self._check_state(state)
        check_trainable(self.model, self.adapter_name, self._sites)
        self._resizer.restore(state, self.resolved.sites, self._growth.newborns(0))
        self._track_afresh()
        self._steps, self._observed = state["steps"], state["observed"]
        self._bad_steps.restart(state["bad_steps"])
        self._limit = state["limit"]
        self._fair_start.resume(state["young"])
        self._tracker.load(state, state["scorer"])
        for key, factor in self._gated_factors().items():
            renew(factor, state["gated"][key])
        self.history = _EVENTS.validate_python(state["history"])
        self._look_ahead()
        if state["sketch"]:
            self._growth.sketch.load(state["sketch"])

    @property
    def _is_regularised(self) -> bool:
        return self.budget.dem > 0 and self._steps < self.resolved.scheduler.last_event

    @property
    def _start_components(self) -> int:
        return max(int(self.resolved.start_ranks.sum()), 1)

    def _track_afresh(self) -> None:
        """Start all tracking at the ranks that the sites have now."""
        self._growth.sketch.close()
        scorers = self._resizer.scorers()
        self._tracker = Tracker(self.budget, self._sites, self.resolved.sites, scorers)
        self._fair_start.restart()
        self._gradients.watch(self._sites)
        self._optimizer = None

    def _draw_components(self) -> None:
        """Draw what components of that kind start from, at the ranks that the sites have now."""
        if self.budget.components == "gated":
            start_gates(self._sites, self._growth.newborns(0).generator)
        elif self.budget.components == "vera":
            start_vectors(self._sites)

    def _reallocate(self, step: int) -> RankEvent:
        """Carry out one event: in a job of several processes the first one decides for all."""
        what = f"the reallocation after step {self._steps}"
        began = time.perf_counter()
        processes.wait_for_all(what)
        with self._undone_on_error(what) as before:
            self._growth.sketch.average(what)
            values = self._resizer.measure(self._check_event, self._tracker, self._growth, what)
            table = self._tracker.survey(values)
            plan = processes.from_first(self.resolved.scheduler.plan(table, step), what)
            processes.in_all(lambda: self._carry_out(table, plan, before), what)
            self._resizer.agree(plan, self._optimizer, what)
            self._limit = self.resolved.scheduler.budget_at(step)
            seconds = time.perf_counter() - began
            event = describe(table, plan, len(self.history), self._steps, self._limit, seconds)
            assert event.spent == self.spent <= self._limit, "surgery and plan disagree on the cost"
            self.history.append(event)
            return event

    def _check_event(self) -> None:
        check_trainable(self.model, self.adapter_name, self._sites)  # another may be active now
        self._check_weights()

    def _carry_out(self, table: ComponentTable, plan: RankPlan, before: Savepoint) -> None:
        newborns = self._growth.newborns(len(self.history) + 1)
        self._resizer.resize(plan, self._optimizer, newborns, before)
        self._growth.sketch.close()
        self._tracker.follow(table, plan, before)
        self._fair_start.follow(plan)
        self._gradients.watch(self._sites)

    def _publish(self, event: RankEvent | None) -> None:
        if event is not None:
            for sink in self.sinks:
                sink(event)

    @contextmanager
    def _undone_on_error(self, what: str) -> Iterator[Savepoint]:
        tracker = self._tracker
        parts = (self, tracker, *tracker.scorers.values(), self._fair_start, self._gradients)
        with (
            undone_on_error(
                what,
                self._sites,
                model=self.model,
                optimizer=self._optimizer,
                others=(*parts, self._growth.sketch, self._bad_steps),
            ) as before,
            self._resizer.undone_on_error(self._optimizer, what),
        ):
            yield before

    def _look_ahead(self) -> None:
        self._growth.look_ahead(self._steps, event=len(self.history))

    def _gated_factors(self) -> dict[str, nn.Parameter]:
        """Return B and the gates of every gated site by name."""
        return {
            f"{site.name}.{name}": factor
            for site in self._sites
            if site.gate is not None
            for name, factor in (("B", site.B), ("gate", site.gate), ("row_gate", site.row_gate))
            if factor is not None
        }

    def _check_state(self, state: dict[str, Any]) -> None:
        mine = {
            "budget": self.budget.model_dump(),
            "total_steps": self.total_steps,
            "sites": [site.name for site in self._sites],
        }
        theirs = {
            "budget": state["budget"],
            "total_steps": state["total_steps"],
            "sites": list(state["ranks"]),
        }
        for key, value in mine.items():
            if theirs[key] != value:
                raise CheckpointError(
                    f"the saved state has other {key} than this run: {theirs[key]} instead of "
                    f"{value}; resume with the spec and the model that wrote it"
                )


def _check_arguments(budget: BudgetSpec, total_steps: int) -> None:
    if not isinstance(budget, BudgetSpec):
        raise SpecError(
            f"budget must be a BudgetSpec, received {type(budget).__name__}; "
            'use rankflow.load_budget("reallocate", rank=8) or another preset'
        )
    if not isinstance(total_steps, int) or total_steps < 1:
        raise BudgetError(
            f"total_steps must be a positive whole number of optimizer steps, received "
            f"{total_steps!r}"
        )


def _check_limit(max_bad_steps: int) -> None:
    if not isinstance(max_bad_steps, int) or max_bad_steps < 1:
        raise RankFlowError(
            f"max_bad_steps must be a positive whole number of steps, received {max_bad_steps!r}; "
            f"the default is {MAX_BAD_STEPS}"
        )


def _trained_beside(model: PeftModel, sites: Sequence[Site]) -> list[nn.Parameter]:
    """Return what is trained beside the adapter, such as a task head."""
    adapter = {id(p) for site in sites for p in (*site.trained, *site.named_parameters.values())}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in adapter]


def _is_finite(loss: Tensor | None, like: Tensor) -> Tensor:
    """Whether a loss is, a boolean of shape ``()``; True where nothing is to be said of it."""
    if loss is None or processes.are_several():
        return torch.ones_like(like)
    return torch.isfinite(loss.detach()).all().to(like.device, non_blocking=True)


def _unwrap(optimizer: Optimizer) -> Optimizer:
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer
