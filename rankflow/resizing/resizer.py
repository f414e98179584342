"""What the engine asks of whoever changes ranks."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch.optim import Optimizer

from rankflow.adapters.newborns import Newborns
from rankflow.adapters.savepoint import Savepoint
from rankflow.adapters.sites import Site
from rankflow.budgeting import ResolvedBudget
from rankflow.growing import Growth
from rankflow.importance.scorer import Scorer
from rankflow.records import BoolArray, FloatArray, IntArray, RankPlan, SiteInfo
from rankflow.tracking import Tracker

Resolve = Callable[[Sequence[SiteInfo]], ResolvedBudget]
"""Resolves the budget for sites with these bounds."""


class Resizer(Protocol):
    """Changes the ranks of one adapter's sites, and reads what the processes of the job know."""

    def resolve(self, infos: Sequence[SiteInfo], resolve: Resolve) -> ResolvedBudget:
        """Resolve the budget for the ranks that the tensors can take.

        Raises:
            BudgetError: They cannot take those that the budget asks for.
        """

    def accelerate(self, site: Site) -> None:
        """Give a DoRA site the fast forward."""

    def scorers(self) -> dict[str, Scorer]:
        """Make the scorers of a ``Tracker``, for the ranks that the sites have now."""

    def begin(
        self,
        infos: tuple[SiteInfo, ...],
        ranks: IntArray,
        magnitudes: BoolArray,
        newborns: Newborns,
    ) -> None:
        """Bring sites to ranks and magnitudes, keeping the identity of every parameter."""

    def restore(
        self, state: dict[str, Any], infos: tuple[SiteInfo, ...], newborns: Newborns
    ) -> None:
        """Bring sites to the ranks of a saved state, to which their weights are loaded later.

        Raises:
            CheckpointError: The state was saved under another engine.
        """

    def state(self) -> dict[str, Any]:
        """Return what ``restore`` needs beside ranks and magnitudes."""

    def measure(
        self, check: Callable[[], None], tracker: Tracker, growth: Growth, what: str
    ) -> FloatArray:
        """Check the model, and bring what all processes know of components to every host.

        Args:
            check: Raises if no event can be carried out; called in every process.
            tracker: What a process knows.
            growth: What it has sketched.
            what: What is being done, as the subject of a sentence.

        Returns:
            What ``Tracker.survey`` takes, equal in all processes.
        """

    def resize(
        self,
        plan: RankPlan,
        optimizer: Optimizer | None,
        newborns: Newborns,
        before: Savepoint,
    ) -> None:
        """Carry out a plan on the sites and on the optimizer's state; waits for no process.

        Args:
            plan: The plan.
            optimizer: The optimizer that trains the sites, or None.
            newborns: Draws what newborns start from.
            before: What brings old tensors back whose memory is freed, if the event is undone.
        """

    def agree(self, plan: RankPlan, optimizer: Optimizer | None, what: str) -> None:
        """Make sure that all processes did the same.

        Raises:
            RankFlowError: One did not; the message names the site.
        """

    def everywhere(self, check: Callable[[], None], what: str) -> None:
        """Check something of the weights, and raise in all processes if it raises in one."""

    def check_gradients(self, step: int) -> bool:
        """Check what has to be true of the gradients of a step; most often nothing.

        Args:
            step: The step whose gradients are complete.

        Returns:
            Whether hooks in backward saw them as they are used: averaged over processes.

        Raises:
            RankFlowError: The processes of the job have different gradients.
        """

    def close(self) -> None:
        """Leave alone what holds the model."""

    def undone_on_error(
        self, optimizer: Optimizer | None, what: str
    ) -> AbstractContextManager[None]:
        """Put values back that were overwritten if the block does not come to its end."""
