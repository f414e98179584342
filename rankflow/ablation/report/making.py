"""How an ablation was run, and what its words mean."""

from collections import Counter
from collections.abc import Iterable, Mapping

from rankflow.ablation.report.document import Block, Bullets, Heading, Paragraph
from rankflow.ablation.report.method import MethodWords
from rankflow.ablation.report.rows import Gathered
from rankflow.ablation.report.verdicts import METRICS
from rankflow.ablation.statistics.intervals import FEWEST_RESAMPLED
from rankflow.specs.ablation import SHARES, AblationSpec


def making_blocks(gathered: Gathered, methods: Mapping[str, MethodWords]) -> list[Block]:
    """Return where the results come from, the methods, and the statistics in words."""
    spec = gathered.spec
    return [
        Heading(2, "How it was run"),
        Bullets(tuple(_origins(gathered))),
        Heading(3, "Methods in words"),
        Bullets(tuple(_definition(spec, name, methods.get(name)) for name in spec.methods)),
        Heading(3, "Statistics in words"),
        Bullets(tuple(_statistics(spec))),
    ]


def _origins(gathered: Gathered) -> list[Paragraph]:
    spec = gathered.spec
    results = gathered.all
    origins = [result.provenance for result in results]
    packages = sorted({package for origin in origins for package in origin.versions})
    versions = [
        f"{package} {_alternatives(o.versions[package] for o in origins if package in o.versions)}"
        for package in packages
    ]
    machines = Counter(origin.machine for origin in origins)
    seeds = (f"{_numbers(spec.seeds_of(budget))} at {budget.label}" for budget in spec.budgets)
    items = [
        Paragraph(f"{spec.name}, digest {spec.digest}.", lead="Spec."),
        Paragraph(f"{'; '.join(seeds)}.", lead="Seeds."),
        Paragraph(f"{', '.join(versions) or 'none known'}.", lead="Versions."),
        Paragraph(f"{_counted(machines) or 'none known'}.", lead="Machine."),
    ]
    commits = Counter(origin.commit[:12] or "outside a repository" for origin in origins)
    items.append(Paragraph(f"{_counted(commits) or 'none known'}.", lead="Commit."))
    if len(machines) > 1:
        text = "times and latencies come from different machines; compare them with care."
        items.append(Paragraph(text, lead="Warning."))
    return items


def _definition(spec: AblationSpec, name: str, words: MethodWords | None) -> Paragraph:
    text = words.summary if words else "No description."
    if words and words.source:
        text += f" ({words.source})"
    variant = spec.variant(name)
    if name in spec.variants:
        said = variant.model_dump(exclude_none=True, exclude={"like"}, exclude_defaults=True)
        differs = ", ".join(f"{key} = {value}" for key, value in said.items())
        text += f". A variant of {variant.like}{': ' + differs if differs else ''}."
    return Paragraph(text, lead=f"{name}.")


def _statistics(spec: AblationSpec) -> list[Paragraph]:
    level, judged = 100 * (1 - spec.alpha), METRICS[spec.judge]
    unit = "absolute" if spec.judge in SHARES else "of the metric"
    margin = f"{spec.margin:g}" if spec.judge in SHARES else f"{100 * spec.margin:g}%"
    return [
        Paragraph(
            f"two methods are compared on the same task with the same seed, so that what a seed "
            f"does to both cancels. {judged} is compared by "
            f"{'difference' if spec.judge in SHARES else 'ratio (the log is averaged)'}; every "
            f"task counts the same. Pairs are taken as independent: a seed that moved the "
            f"difference the same way on every task would make p too small.",
            lead="Pairs:",
        ),
        Paragraph(
            "a seed repeats the training, on the same test rows: only a planted task draws a new "
            "problem for each. Other rows of a task, or other tasks, would move a difference too, "
            "and neither p nor the interval covers that.",
            lead="Reach:",
        ),
        Paragraph(
            "if two methods are alike, every pattern of signs of the paired differences is as "
            "likely as the one seen. p is the share of patterns whose mean is at least as far from "
            "0 (two-sided; Fisher 1935).",
            lead="Sign-flip test:",
        ),
        Paragraph(
            f"studentised bootstrap {level:g}% interval of the mean paired difference, resampled "
            f"within tasks; Student's with fewer than {FEWEST_RESAMPLED} pairs, and where the "
            f"bootstrap's is over twice as wide. Simulations showed that percentile and BCa "
            f"intervals are too narrow for so few seeds.",
            lead="Interval:",
        ),
        Paragraph(
            f"p-values are corrected over the comparisons declared, within one budget, so that "
            f"the chance of any false claim there stays below {spec.alpha:g} (Holm 1979). Budgets "
            f"are not corrected against each other, and the interaction is one test by itself.",
            lead="Holm:",
        ),
        Paragraph(
            f"two one-sided t tests say that the difference lies within {margin} {unit}, the "
            f"margin declared beforehand (TOST; Schuirmann 1987). No significant difference is not "
            f"equivalence.",
            lead="Equivalence:",
        ),
        Paragraph(
            "mean over standard deviation of the paired differences. The seeds for 80% power "
            "assume that the effect is as large as the one observed, which few seeds know badly.",
            lead="d_z:",
        ),
        Paragraph(
            "a run that diverged is in no mean; it is counted, and no method is called better "
            "for the pairs that remain after it diverged.",
            lead="Broken runs:",
        ),
    ]


def _alternatives(values: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(sorted(values)))


def _counted(counts: Counter[str]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(
        f"{name} ({count} {'cell' if count == 1 else 'cells'})"
        for name, count in sorted(counts.items())
    )


def _numbers(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))
