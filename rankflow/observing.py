"""All that watches a run from step to step, and follows its components through every event."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from rankflow.adapters.savepoint import Savepoint
from rankflow.adapters.sites import Site
from rankflow.budgeting import ResolvedBudget
from rankflow.errors import RankFlowError
from rankflow.fairstart import FairStart
from rankflow.growing import Growth
from rankflow.importance.bad_steps import BadSteps
from rankflow.importance.finite import check_weights, is_finite_loss
from rankflow.importance.gradients import StepGradients, trained_beside
from rankflow.records import ComponentTable, RankPlan
from rankflow.resizing.resizer import Resizer
from rankflow.specs.budget import BudgetSpec
from rankflow.tracking import Tracker


class Observers:
    """What begins, follows an event, is saved and is closed together.

    Args:
        model: The model.
        sites: Its sites; call ``restart`` once they have the ranks at which the run begins.
        budget: The budget.
        resolved: The budget in the units of this model and run.
        resizer: Makes the scorers, and brings together what the processes of the job know.
        max_bad_steps: How many bad steps in a row stop the run.

    Attributes:
        gradients: Whether a step's gradients are finite, and how they were clipped.
        bad_steps: Counts the steps that were not.
        fair_start: Counts the steps of young components, and corrects Adam for them.
        growth: Sketches the gradient, and tells where newborns point.
        tracker: Scores and ages of all components, since the last ``restart``.
        observed: Steps that were observed, those that do not count among them.
    """

    def __init__(
        self,
        model: PeftModel,
        sites: Sequence[Site],
        budget: BudgetSpec,
        resolved: ResolvedBudget,
        resizer: Resizer,
        max_bad_steps: int,
    ) -> None:
        self._sites = tuple(sites)
        self._budget = budget
        self._resolved = resolved
        self._resizer = resizer
        self.gradients = StepGradients(sites, trained_beside(model, sites))
        self.bad_steps = BadSteps(sites, max_bad_steps)
        self.fair_start = FairStart(sites)
        self.growth = Growth(budget, sites, resolved)
        self.observed = 0
        self._accept = torch.ones((), dtype=torch.bool, device=sites[0].A.device)

    def restart(self) -> None:
        """Begin anew, at the ranks that the sites have now."""
        self.growth.sketch.close()
        scorers = self._resizer.scorers()
        self.tracker = Tracker(self._budget, self._sites, self._resolved.sites, scorers)
        self.fair_start.restart()
        self.gradients.watch(self._sites)

    def observe(self, step: int, loss_scale: Tensor | float, loss: Tensor | None) -> None:
        """Fold in the gradients of a step; see ``RankFlow.observe``.

        Args:
            step: Number of the step, from 1.
            loss_scale: Factor of a gradient scaler that was on the loss and is off the gradients.
            loss: Loss of the step, or None.
        """
        was_averaged = self._resizer.check_gradients(step)
        reading = self.gradients.read(loss_scale)
        # Gradients that are averaged by hand after backward were seen before that.
        unclip = reading.unclip if was_averaged else torch.ones_like(reading.unclip)
        is_finite = is_finite_loss(loss, like=reading.accept)
        self._accept = reading.accept & is_finite
        if not self._resolved.is_static:
            self.tracker.observe(unclip, self._accept)
            self.growth.sketch.observe(self._accept, loss_scale)
        self.observed += 1
        self.bad_steps.count(step, reading, is_finite, self.gradients.parameters)

    def mute(self) -> None:
        """Set all gradients of the step that was observed last to zero if it does not count."""
        self.gradients.mute(self._accept)

    def check_finite(self, steps: int) -> None:
        """Check that all weights that are trained are finite; waits for the device.

        Args:
            steps: Optimizer steps taken.

        Raises:
            DivergenceError: One is not; the message names its site.
        """
        self._resizer.everywhere(lambda: self._check_weights(steps), "checking the weights")

    def _check_weights(self, steps: int) -> None:
        check_weights(
            self.gradients.parameters,
            f"training has diverged by step {steps}: go on from an earlier checkpoint, with "
            "a lower learning rate, or in bf16 instead of fp16",
        )

    def check_observed(self, steps: int) -> None:
        """Check that there is something to decide by, where an event is due.

        Args:
            steps: Optimizer steps taken.

        Raises:
            RankFlowError: No step was observed.
        """
        if self.observed == 0:
            raise RankFlowError(
                f"a reallocation is due after step {steps}, but observe() saw no gradients; "
                "call flow.observe() after loss.backward() and before optimizer.step()"
            )

    def survey(self, check: Callable[[], None], steps: int, what: str) -> ComponentTable:
        """Return what all processes of the job together know of every component.

        Args:
            check: Raises if no event can be carried out.
            steps: Optimizer steps taken.
            what: What is being done, as the subject of a sentence.

        Raises:
            DivergenceError: A weight or a score is not finite.
        """

        def check_all() -> None:
            check()
            self._check_weights(steps)

        self.growth.sketch.average(what)
        values = self._resizer.measure(check_all, self.tracker, self.growth, what)
        return self.tracker.survey(values)

    def follow(self, table: ComponentTable, plan: RankPlan, before: Savepoint) -> None:
        """Follow the components through a resize that has been carried out.

        Args:
            table: What was known before.
            plan: What was done.
            before: What brings old state back whose memory is freed, if the resize is undone.
        """
        self.growth.sketch.close()
        self.tracker.follow(table, plan, before)
        self.fair_start.follow(plan)
        self.gradients.watch(self._sites)

    def parts(self) -> tuple[object, ...]:
        """Return all objects here whose attributes may change, as a ``Savepoint`` takes them."""
        scorers = self.tracker.scorers.values()
        steps = self.gradients, self.bad_steps, self.fair_start
        return (self, *steps, self.growth.sketch, self.tracker, *scorers)

    def close(self) -> None:
        """Remove all hooks on gradients and optimizer."""
        self.gradients.close()
        self.fair_start.close()
        self.growth.sketch.close()
        self.bad_steps.close()

    def state(self) -> dict[str, Any]:
        """Return what ``load`` needs, as plain values and tensors; every process has to call it."""
        self.growth.sketch.average("saving the state of RankFlow")
        return {
            "observed": self.observed,
            "bad_steps": self.bad_steps.in_a_row,
            "young": self.fair_start.lived(),
            **self.tracker.state(),
            "scorer": self.tracker.tensors(),
            "sketch": {key: value.clone() for key, value in self.growth.sketch.state().items()},
        }

    def load(self, state: dict[str, Any], steps: int, event: int) -> None:
        """Begin anew from what ``state`` returned, at sites that have the ranks of then.

        Args:
            state: The state, among others.
            steps: Optimizer steps taken by then.
            event: Running number of the event that came next.
        """
        self.restart()
        self.observed = state["observed"]
        self.bad_steps.restart(state["bad_steps"])
        self.fair_start.resume(state["young"])
        self.tracker.load(state, state["scorer"])
        self.growth.look_ahead(steps, event)
        if state["sketch"]:
            self.growth.sketch.load(state["sketch"])
