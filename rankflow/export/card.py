"""The model card of an exported adapter: where its parameters went, and how to load it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankflow.report.layout import lay_out


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What a run knows of its adapter beyond the weights.

    Attributes:
        spent: Trainable adapter parameters.
        target: Trainable adapter parameters that the budget allowed.
        steps: Optimizer steps taken.
        budget: The budget spec, as plain values.
        metrics: What was measured, by name.
    """

    spent: int
    target: int
    steps: int
    budget: dict[str, Any]
    metrics: dict[str, float] = field(default_factory=dict)


def write_card(
    ranks: Mapping[str, int],
    *,
    library: str,
    loading: str,
    base_model: str,
    is_dora: bool,
    trained: int,
    stored: int,
    facts: AdapterFacts | None,
) -> str:
    """Write the card as Markdown with the front matter that model hubs read.

    Args:
        ranks: Rank of each site, by site name.
        library: The library that loads it, as model hubs know it.
        loading: Python that loads it.
        base_model: Name or path of the base model; may be empty.
        is_dora: Whether the adapter has magnitudes.
        trained: Parameters of the sites that were trained.
        stored: Parameters of the sites in the file.
        facts: What the run knows; None if the adapter was exported without one.
    """
    method = "DoRA" if is_dora else "LoRA"
    origin = f" on `{base_model}`" if base_model else ""
    sections = [
        _front_matter(base_model, library, method),
        f"# {method} adapter with ranks chosen under a budget",
        f"Trained with RankFlow{origin}. Stock `{library}` loads it:\n\n```python\n{loading}\n```",
    ]
    if trained != stored:
        sections.append(tell_storage(trained, stored))
    if facts is not None:
        sections += [_budget(facts), *_metrics(facts.metrics)]
    sections.append(f"## Ranks\n\n{rank_markdown(ranks)}")
    return "\n\n".join(sections) + "\n"


def tell_storage(trained: int, stored: int) -> str:
    """Say why an adapter's file holds more parameters than were trained.

    >>> tell_storage(1000, 1040)[:53]
    'The file holds 1,040 parameters and 1,000 are trained'
    """
    return (
        f"The file holds {stored:,} parameters and {trained:,} are trained: PEFT wants a magnitude "
        "and a component at every DoRA site, so it also holds the norms of sites without a "
        "magnitude of their own, and zeros for sites without a component."
    )


def rank_markdown(ranks: Mapping[str, int]) -> str:
    """Lay the ranks out as a Markdown table, layers by module types.

    >>> print(rank_markdown({"h.0.q": 2, "h.0.v": 0, "h.1.q": 3, "h.1.v": 1}))
    | layer | q | v |
    | --- | --- | --- |
    | 0 | 2 | 0 |
    | 1 | 3 | 1 |
    """
    layout = lay_out(ranks)
    grid = [["" for _ in layout.columns] for _ in layout.rows]
    for site, cell in layout.cells.items():
        grid[cell.row][cell.column] = str(ranks[site])
    rows = [
        ["layer", *layout.columns],
        ["---"] * (len(layout.columns) + 1),
        *([label, *row] for label, row in zip(layout.rows, grid, strict=True)),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _front_matter(base_model: str, library: str, method: str) -> str:
    is_hub_id = bool(base_model) and not Path(base_model).is_absolute()
    base = f"base_model: {base_model}\n" if is_hub_id else ""
    return f"---\n{base}library_name: {library}\ntags:\n- rankflow\n- {method.lower()}\n---"


def _budget(facts: AdapterFacts) -> str:
    spec = facts.budget
    return (
        "## Budget\n\n"
        f"{facts.spent:,} trainable adapter parameters of {facts.target:,} allowed, after "
        f"{facts.steps:,} steps. Score `{spec['score']}`, policy `{spec['policy']}`, schedule "
        f"`{spec['schedule']}` from {spec['start']:g}x."
    )


def _metrics(metrics: Mapping[str, float]) -> list[str]:
    if not metrics:
        return []
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in metrics.items())
    return [f"## Metrics\n\n| metric | value |\n|---|---|\n{rows}"]
