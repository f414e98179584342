"""Where newborns point, and when their directions are looked for."""

from collections.abc import Sequence
from typing import assert_never

import numpy as np
import torch
from torch import Tensor

from rankflow.adapters.newborns import Newborns, along, kaiming, orthogonal
from rankflow.adapters.sites import Site
from rankflow.budgeting import ResolvedBudget
from rankflow.importance.sketch import GradientSketch
from rankflow.specs.budget import BudgetSpec

# Directions that the gradient's sketch resolves at a site; one event rarely grows a site by more.
_WIDTH = 8


class Growth:
    """Draws the newborns of every event, along a gradient that is sketched shortly before it.

    Args:
        budget: The budget spec.
        sites: The sites.
        resolved: The budget in the units of this model and run.
    """

    def __init__(self, budget: BudgetSpec, sites: Sequence[Site], resolved: ResolvedBudget) -> None:
        self._budget = budget
        self._sites = tuple(sites)
        self._resolved = resolved
        self.sketch = GradientSketch(sites, width=_WIDTH, seed=budget.seed)

    def look_ahead(self, step: int, event: int) -> None:
        """Sketch gradients from the next step on if an event with possible births is near.

        Args:
            step: Optimizer steps taken.
            event: Running number of the next event.
        """
        if self._budget.grow != "gradient" or self._resolved.is_static or self.sketch.is_open:
            return
        scheduler = self._resolved.scheduler
        ahead = range(step + 1, step + self._budget.grow_steps + 1)
        due = next((later for later in ahead if scheduler.is_due(later)), None)
        if due is None:
            return
        spent = sum(site.parameters for site in self._sites)
        sites = zip(self._sites, self._resolved.sites, strict=True)
        costs = [info.component_cost for site, info in sites if site.rank < info.max_rank]
        if costs and scheduler.allowance(spent, due) >= min(costs):
            self.sketch.open(self._sites, event=event)

    def energy(self, live: Sequence[Tensor]) -> Tensor:
        """Return how much gradient there is outside of what each site spans, shape ``(S,)``.

        It is 0 where no sketch was taken; see ``GradientSketch.energy``.

        Args:
            live: The live rows of each site, ``(rank, width)``.
        """
        return self.sketch.energy(live)

    def newborns(self, event: int) -> Newborns:
        """Return how one event draws its newborns, equal in every process.

        Args:
            event: Running number from 1; 0 is the start of the run.
        """
        seed = int(np.random.SeedSequence([self._budget.seed, event]).generate_state(1)[0])
        generator = torch.Generator().manual_seed(seed)
        match self._budget.grow:
            case "gradient":
                return along(self.sketch.directions, generator)
            case "orthogonal":
                return orthogonal(generator)
            case "random":
                return kaiming([site.kind for site in self._sites], generator)
            case _:
                assert_never(self._budget.grow)
