"""Hands adapters to RankFlow as PEFT makes them, and lets real events change their ranks."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import peft
import pytest
import torch
from peft import PeftModel, PeftType

import rankflow as rf
from rankflow.adapters.sites import Site, find_sites
from rankflow.records import SiteInfo
from rankflow.specs.budget import BudgetSpec

Scene = Literal["uneven", "dead", "magnitude-off"]

SCENES: dict[Scene, str] = {
    "uneven": "ranks other than PEFT gave",
    "dead": "a site of rank 0",
    "magnitude-off": "a DoRA site without its magnitude",
}
"""What the events bring about."""

_STEPS = 4
_RANKS = (3, 1, 2)  # of the sites in turn, as far as half of what their matrices hold


@dataclass(frozen=True, slots=True)
class Steered:
    """What RankFlow did to one adapter.

    Attributes:
        before: Rank of each site as PEFT made it.
        after: Rank of each site after the last event.
        pruned: Components that events removed.
        magnitudes: Whether each site trains a magnitude; empty if the budget does not cover them.
    """

    before: dict[str, int]
    after: dict[str, int]
    pruned: int
    magnitudes: dict[str, bool]

    def shows(self, scene: Scene) -> bool:
        """Whether ranks changed, and what the scene is about came about."""
        came_about = {
            "uneven": True,
            "dead": 0 in self.after.values(),
            "magnitude-off": False in self.magnitudes.values(),
        }
        return self.before != self.after and came_about[scene]


class Steering:
    """Steers every LoRA and DoRA adapter that is made while it is installed.

    An adapter that is loaded is left to PEFT: it is the stock side of a round trip.

    Args:
        scene: What the events shall bring about; None leaves all to stock PEFT.
    """

    def __init__(self, scene: Scene | None) -> None:
        self.scene = scene
        self.done: list[Steered] = []
        self._engines: list[rf.RankFlow] = []  # attached as long as the test runs

    def begin_test(self) -> None:
        """Forget the last test."""
        self.done, self._engines = [], []

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Stand between PEFT and whoever imports from it from now on."""
        if self.scene is None:
            yield
            return
        make, add = peft.get_peft_model, PeftModel.add_adapter
        load = PeftModel.load_adapter

        def get_peft_model(*args: Any, **kwargs: Any) -> Any:
            model = make(*args, **kwargs)
            if isinstance(model, PeftModel):
                self._steer(model, model.active_adapter)
            return model

        def add_adapter(model: PeftModel, adapter_name: str, *args: Any, **kwargs: Any) -> None:
            add(model, adapter_name, *args, **kwargs)
            self._steer(model, adapter_name)

        def load_adapter(*args: Any, **kwargs: Any) -> Any:
            with pytest.MonkeyPatch.context() as stock:
                stock.setattr(PeftModel, "add_adapter", add)
                return load(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(peft, "get_peft_model", get_peft_model)
            patch.setattr(PeftModel, "add_adapter", add_adapter)
            patch.setattr(PeftModel, "load_adapter", load_adapter)
            yield

    def _steer(self, model: PeftModel, adapter_name: str) -> None:
        if model.peft_config[adapter_name].peft_type != PeftType.LORA:
            return
        assert self.scene is not None  # or nothing is installed
        with torch.random.fork_rng(devices=[]), _active(model, adapter_name):
            engine, steered = _steer(model, adapter_name, self.scene)
        self._engines.append(engine)
        self.done.append(steered)


def _steer(model: PeftModel, adapter_name: str, scene: Scene) -> tuple[rf.RankFlow, Steered]:
    """Run all events of a short training by a random linear loss, at a learning rate of 0.

    Two adapters that are alike are treated alike, and no weight moves but by an event.
    """
    sites = find_sites(model, adapter_name)
    before = {site.name: site.rank for site in sites}
    flow = rf.RankFlow(model, _budget(sites, scene), _STEPS, adapter_name)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(_STEPS):
        for site in sites:
            _push(site, generator)
        flow.observe()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        flow.step(optimizer)
    pruned = sum(len(event.pruned) for event in flow.history)
    return flow, Steered(before, flow.ranks, pruned, flow.magnitudes)


def _budget(sites: tuple[Site, ...], scene: Scene) -> BudgetSpec:
    """Return a budget with one possible end: minimum ranks that take all of its target."""
    infos = [site.describe() for site in sites]
    ranks = [max(1, min(_RANKS[i % 3], info.max_rank // 2)) for i, info in enumerate(infos)]
    magnitudes = sum(info.fixed_cost for info in infos)
    if scene == "dead" and (magnitudes or len(infos) > 1):  # something must be left to train
        ranks[0] = 0
    budgeted = scene == "magnitude-off" and magnitudes > 0
    kept = infos[1].fixed_cost if budgeted and len(infos) > 1 else 0 if budgeted else magnitudes
    target = kept + _cost(infos, ranks)
    larger = [min(rank + 2, info.max_rank) for rank, info in zip(ranks, infos, strict=True)]
    return rf.load_budget(
        "reallocate",
        params=target,
        start=(magnitudes + _cost(infos, larger) + 0.5) / target,  # whole parameters, rounded down
        schedule="linear",
        warmup=0,
        cooldown=1,
        every=1,
        grow="random",  # a gradient of the weight takes a forward
        magnitude="budgeted" if budgeted else "always",
        bounds={
            f"^{re.escape(info.name)}": {"min_rank": rank}
            for info, rank in zip(infos, ranks, strict=True)
        },
    )


def _cost(infos: list[SiteInfo], ranks: list[int]) -> int:
    return sum(info.plain_cost * rank for info, rank in zip(infos, ranks, strict=True))


def _push(site: Site, generator: torch.Generator) -> None:
    """Run backward of a random linear function of the site's parameters."""
    for parameter in (*site.trained, site.magnitude):
        if parameter is not None and parameter.numel() > 0:
            direction = torch.randn(parameter.shape, generator=generator)
            (parameter * direction.to(parameter)).sum().backward()


@contextmanager
def _active(model: PeftModel, adapter_name: str) -> Iterator[None]:
    """Let an adapter train for a while, if it is not the one that does."""
    active = model.active_adapters
    if adapter_name in active:
        yield
        return
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.base_model.set_adapter(adapter_name)
    yield
    model.base_model.set_adapter(active)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[name])
