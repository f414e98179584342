"""RankFlow: watches a model train, and moves its adapter parameters to where they earn most.

One event is a straight line, and no call returns upward::

    observers.survey()  what is every component worth?               -> ComponentTable
    scheduler.plan()    which stay, and where are new ones born?     -> RankPlan
    resizer.resize()    parameters and optimizer state
    observers.follow()  scores and all else that is known of the components
    sinks               whoever wants to know                        <- RankEvent

All but the sinks is one transaction: whatever interrupts it leaves model, optimizer and engine as
they were. What a sink raises reaches the caller, and the event stands.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from peft import PeftModel
from torch import Tensor
from torch.optim import Optimizer

from rankflow import processes
from rankflow.adapters import gating
from rankflow.adapters.norm_cache import Epoch
from rankflow.adapters.savepoint import Savepoint
from rankflow.adapters.sites import find_sites, magnitudes_on
from rankflow.adapters.stacked import warn_of_stacked_weights
from rankflow.adapters.stock import check_trainable
from rankflow.adopting import adopt, unwrap
from rankflow.budgeting import check_arguments
from rankflow.checkpoint_state import check_same_run
from rankflow.dem import Regulariser
from rankflow.eventing import describe, dump_events, load_events
from rankflow.export.card import AdapterFacts
from rankflow.importance.bad_steps import MAX_BAD_STEPS, check_limit
from rankflow.observing import Observers
from rankflow.preparing import begin, prepare
from rankflow.records import ComponentTable, RankEvent, RankPlan
from rankflow.resizing.choose import choose_resizer
from rankflow.resizing.transaction import transaction
from rankflow.specs.budget import BudgetSpec


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
        check_arguments(budget, total_steps)
        check_limit(max_bad_steps)
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
        with transaction("attaching RankFlow to the model", self._resizer, model, self._sites):
            self._set_up(total_steps, accelerate, resume, max_bad_steps)

    def _set_up(
        self, total_steps: int, accelerate: bool, resume: dict[str, Any] | None, max_bad_steps: int
    ) -> None:
        model, budget, sites, resizer = self.model, self.budget, self._sites, self._resizer
        is_new = gating.convert_new(sites, budget.components, is_resumed=resume is not None)
        self.resolved = prepare(model, sites, budget, total_steps, resizer, accelerate=accelerate)
        self._steps = 0
        self._limit = self.resolved.start
        components = max(int(self.resolved.start_ranks.sum()), 1)
        last_event = self.resolved.scheduler.last_event
        self._regulariser = Regulariser(sites, components, budget.dem, last_event)
        self._observers = Observers(model, sites, budget, self.resolved, resizer, max_bad_steps)
        if resume is not None:
            self._restore(resume)
            return
        begin(sites, budget, self.resolved, resizer, self._observers.growth, is_new=is_new)
        self._observers.restart()
        self._look_ahead()

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
        self._observers.observe(self._steps + 1, loss_scale, loss)

    def mute_bad_step(self) -> None:
        """Set all gradients of the step that ``observe`` has seen to zero if it does not count.

        Then it leaves the weights finite: the optimizer takes the step that it takes without a
        gradient. It does not wait for the device. With a gradient scaler leave it out: that skips
        the step by itself, and has to see why. Under FSDP2 a process mutes what it holds.
        """
        self._observers.mute()

    def check_finite(self) -> None:
        """Check that all weights that the run trains are finite; waits for the device.

        Raises:
            DivergenceError: One is not; the message names its site.
        """
        self._observers.check_finite(self._steps)

    def penalty(self) -> Tensor:
        """Return what the budget's regulariser adds to the loss of a step, a scalar.

        In a loop of your own, add it to the loss; under gradient accumulation, to the loss of one
        micro-batch. It is 0 if the budget has none, and once pruning has ended.
        """
        return self._regulariser.penalty(self._steps)

    def regularise(self) -> None:
        """Add the gradient of ``penalty`` to this step's gradients, instead of adding it to a loss.

        Call it after ``observe``, so that the scores see the loss alone. The addition is not
        clipped.
        """
        self._regulariser.add_gradient(self._steps)

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
            self._observers.check_observed(self._steps)
            event = self._reallocate(self._steps)
        try:
            self._look_ahead()
        finally:
            self._publish(event)
        return event

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
        inner = unwrap(optimizer)
        if inner is not self._optimizer:
            adopt(self._sites, inner)
            self._optimizer = inner
            self._observers.fair_start.attach(inner)

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
        self._observers.close()
        self._resizer.close()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs, as plain values and tensors.

        In a job of several processes all of them have to call it; one of them may save it.
        """
        return {
            "budget": self.budget.model_dump(),
            "total_steps": self.total_steps,
            "ranks": self.ranks,
            "steps": self._steps,
            "limit": self._limit,
            "magnitudes": magnitudes_on(self._sites).tolist(),
            **self._resizer.state(),
            **self._observers.state(),
            "gated": gating.save_gated(self._sites),
            "history": dump_events(self.history),
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
        check_same_run(state, self.budget.model_dump(), self.total_steps, list(self.ranks))
        self._check_trainable()
        self._resizer.restore(state, self.resolved.sites, self._observers.growth.newborns(0))
        gating.load_gated(self._sites, state["gated"])
        self._optimizer = None
        self._steps, self._limit = state["steps"], state["limit"]
        self.history = load_events(state["history"])
        self._observers.load(state, self._steps, event=len(self.history))

    def _reallocate(self, step: int) -> RankEvent:
        """Carry out one event: in a job of several processes the first one decides for all."""
        what = f"the reallocation after step {self._steps}"
        began = time.perf_counter()
        processes.wait_for_all(what)
        with self._undone_on_error(what) as before:
            table = self._observers.survey(self._check_trainable, self._steps, what)
            plan = processes.from_first(self.resolved.scheduler.plan(table, step), what)
            processes.in_all(lambda: self._carry_out(table, plan, before), what)
            self._resizer.agree(plan, self._optimizer, what)
            self._limit = self.resolved.scheduler.budget_at(step)
            seconds = time.perf_counter() - began
            event = describe(table, plan, len(self.history), self._steps, self._limit, seconds)
            assert event.spent == self.spent <= self._limit, "surgery and plan disagree on the cost"
            self.history.append(event)
            return event

    def _check_trainable(self) -> None:
        check_trainable(self.model, self.adapter_name, self._sites)  # another may be active now

    def _carry_out(self, table: ComponentTable, plan: RankPlan, before: Savepoint) -> None:
        newborns = self._observers.growth.newborns(len(self.history) + 1)
        self._resizer.resize(plan, self._optimizer, newborns, before)
        self._observers.follow(table, plan, before)

    def _publish(self, event: RankEvent | None) -> None:
        if event is not None:
            for sink in self.sinks:
                sink(event)

    def _undone_on_error(self, what: str) -> AbstractContextManager[Savepoint]:
        others = (self, *self._observers.parts())
        return transaction(what, self._resizer, self.model, self._sites, self._optimizer, others)

    def _look_ahead(self) -> None:
        self._observers.growth.look_ahead(self._steps, event=len(self.history))
