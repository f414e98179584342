"""Ranks that change by slots that are set to zero, under FSDP2, where no shape can change.

A step costs nothing more than elsewhere: a slot of zeros stays zero by itself (``adapters.slots``),
and every process scores its own rows. An event takes one sum over the processes, of all scores and
of the live rows that newborns have to stay away from.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from torch.optim import Optimizer

from rankflow import processes
from rankflow.adapters.dora import accelerate_site
from rankflow.adapters.newborns import Newborns
from rankflow.adapters.norm_cache import FreshNorms
from rankflow.adapters.savepoint import Savepoint
from rankflow.adapters.sites import Site
from rankflow.adapters.slots import Slots
from rankflow.allocation.policies import plan_from_ranks
from rankflow.budgeting import ResolvedBudget, even_ranks
from rankflow.errors import BudgetError, CheckpointError
from rankflow.growing import Growth
from rankflow.importance.registry import make_scorers
from rankflow.importance.scorer import Scorer
from rankflow.records import BoolArray, FloatArray, IntArray, RankPlan, SiteInfo
from rankflow.resizing import mask_surgery
from rankflow.resizing.exchange import prepare, sizes
from rankflow.resizing.physical import untrained
from rankflow.resizing.resizer import Resolve
from rankflow.resizing.row_factors import note_row_factors
from rankflow.resizing.sharding import LOCAL_SCORES, check_budget, check_shards, gather_again
from rankflow.resizing.slot_scores import SlotScores, slots_of, table_order
from rankflow.specs.budget import BudgetSpec
from rankflow.tracking import Tracker


class Masked:
    """Sets slots to zero and fills them; see ``Resizer``.

    Args:
        model: The model, under FSDP2.
        sites: Its sites; they get slots.
        budget: The budget.

    Raises:
        RankFlowError: The model is sharded otherwise, or the budget asks for what needs whole
            tensors.
    """

    def __init__(self, model: PeftModel, sites: Sequence[Site], budget: BudgetSpec) -> None:
        check_budget(budget)
        check_shards(sites)
        for site in sites:
            site.slots = Slots(site.A, site.B)
        self._model = model
        self._sites = tuple(sites)
        self._budget = budget
        self._rows: list[Tensor] = []

    def resolve(self, infos: Sequence[SiteInfo], resolve: Resolve) -> ResolvedBudget:
        """Resolve the budget within the slots that there are.

        Raises:
            BudgetError: They are too few for its start, its target or its bounds.
        """
        free = resolve(infos)
        needed = free.start_ranks.tolist()
        if free.target > free.start:
            needed = np.maximum(needed, even_ranks(infos, free.target)).tolist()
        bounds = [self._budget.bounds_of(info.name)[1] or 0 for info in infos]
        self._check_room([max(*pair) for pair in zip(needed, bounds, strict=True)])
        slots = zip(infos, slots_of(self._sites), strict=True)
        return resolve([replace(i, max_rank=min(i.max_rank, s.capacity)) for i, s in slots])

    def _check_room(self, needed: Sequence[int]) -> None:
        for site, slots, rank in zip(self._sites, slots_of(self._sites), needed, strict=True):
            if rank > slots.capacity:
                raise BudgetError(
                    f"the budget asks for rank {rank} at site {site.name!r}, and its adapter was "
                    f"made with r={slots.capacity}, which under FSDP2 is the most that it can "
                    f"hold; make it with LoraConfig(r={max(needed)}) at least, and with twice the "
                    "mean rank to leave room to move"
                )

    def accelerate(self, site: Site) -> None:
        """Give a DoRA site the fast forward, without a memory for its norms."""
        accelerate_site(site)
        site.dora_variant.cache = FreshNorms()

    def scorers(self) -> dict[str, Scorer]:
        """Make the scorers that the budget asks for, each in the table's order."""
        made = make_scorers(self._budget, self._sites)["components"]
        if self._budget.score in LOCAL_SCORES:
            made = SlotScores(made, self._sites)
        return {"components": made}

    def begin(
        self,
        infos: tuple[SiteInfo, ...],
        ranks: IntArray,
        magnitudes: BoolArray,
        newborns: Newborns,
    ) -> None:
        """Keep the largest components of every site."""
        what = "attaching RankFlow to the model"
        squares = processes.in_all(lambda: sizes(self._sites), what)
        processes.add_up(squares, what)
        slots = slots_of(self._sites)
        order = table_order(slots, squares.device)
        scales = np.repeat([site.scale for site in self._sites], [len(s.live) for s in slots])
        scores = scales * squares.prod(dim=0).sqrt()[order].to("cpu", torch.float64).numpy()
        table = untrained(infos, np.array([site.rank for site in self._sites]), scores)
        plan = plan_from_ranks(table, ranks)
        assert not plan.births.any(), "a new model begins with all of its slots"
        for s, keep in zip(slots, plan.keep, strict=True):
            mask_surgery.keep_only(s, [s.live[i] for i in keep], None)

    def restore(
        self, state: dict[str, Any], infos: tuple[SiteInfo, ...], newborns: Newborns
    ) -> None:
        """Take the slots of a saved state for live."""
        if state.get("slots") is None:
            raise CheckpointError(
                "the saved state is of a run without FSDP2, whose tensors have other shapes; "
                "resume it without, or export its adapter and begin a run from that"
            )
        for slots, live in zip(slots_of(self._sites), state["slots"], strict=True):
            if live and max(live) >= slots.capacity:
                raise CheckpointError(
                    f"the saved state has components in slot {max(live)}, and the adapter was made "
                    f"with r={slots.capacity}; make it with the r of the run that is resumed"
                )
            mask_surgery.keep_only(slots, live, None)

    def state(self) -> dict[str, Any]:
        """Return the slot of every component, by site."""
        return {"slots": [list(slots.live) for slots in slots_of(self._sites)]}

    def measure(
        self, check: Callable[[], None], tracker: Tracker, growth: Growth, what: str
    ) -> FloatArray:
        """Bring scores and live rows together."""
        scorer = tracker.scorers["components"]
        spread = scorer if isinstance(scorer, SlotScores) else None
        gather_again(self._model)

        def share() -> Any:
            check()
            return prepare(self._sites, None if spread is None else spread.share())

        exchange = processes.in_all(share, what)
        processes.add_up(exchange.flat, what)
        note_row_factors(self._model, self._sites)

        def read() -> FloatArray:
            if spread is not None:
                spread.receive(exchange.scores)
            return tracker.measure(growth.energy(exchange.rows))

        self._rows = exchange.rows
        return processes.from_first(processes.in_all(read, what), what)

    def resize(
        self,
        plan: RankPlan,
        optimizer: Optimizer | None,
        newborns: Newborns,
        before: Savepoint,
    ) -> None:
        """Set slots to zero, and write newborns into free ones."""
        mask_surgery.resize(self._sites, plan, optimizer, newborns, self._rows)
        self._rows = []

    def agree(self, plan: RankPlan, optimizer: Optimizer | None, what: str) -> None:
        """Compare which slots are live: their values lie in one process each."""
        prints = [hash(tuple(slots.live)) for slots in slots_of(self._sites)]
        processes.check_equal(prints, [site.name for site in self._sites], what)

    def everywhere(self, check: Callable[[], None], what: str) -> None:
        """Check in every process what it holds."""
        processes.in_all(check, what)

    def check_gradients(self, step: int) -> bool:
        """Do nothing: every process holds gradients of its own."""
        return True

    def close(self) -> None:
        """Do nothing: FSDP2 was not touched."""

    @contextmanager
    def undone_on_error(self, optimizer: Optimizer | None, what: str) -> Iterator[None]:
        """Copy what a resize may overwrite to the host, and put it back if the block fails."""
        slots = slots_of(self._sites)

        def save() -> list[tuple[Tensor, Tensor]]:
            parts = mask_surgery.held(self._sites, optimizer)
            return [(part, part.to("cpu", copy=True)) for part in parts]

        copies = processes.in_all(save, what)
        live = [s.live for s in slots]
        try:
            yield
        except BaseException:
            for part, copy in copies:
                part.copy_(copy)
            for s, before in zip(slots, live, strict=True):
                s.live = before
            raise
