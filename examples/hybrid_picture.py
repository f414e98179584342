"""Draw what each method makes of the planted problem: ranks, and dots for trained magnitudes.

python examples/hybrid_picture.py hybrid.png
"""

import sys

from planted_hybrid import METHODS, NAMES, RESCALED, TRUE_RANKS, train

from rankflow.report.heatmap import rank_heatmap

SEED = 0


def main(path: str) -> None:
    """Train every method once, and draw the layers as rows and the methods as columns."""
    ranks = {f"{name}.needed": TRUE_RANKS.get(i, 0) for i, name in enumerate(NAMES)}
    magnitudes = {f"{name}.needed": i in RESCALED for i, name in enumerate(NAMES)}
    for method, (use_dora, *settings) in METHODS.items():
        if method == "true ranks":
            continue
        left, flow = train(SEED, use_dora, *settings)
        print(f"{method}: {left:.1%} of the excess loss left")
        for name in NAMES:
            ranks[f"{name}.{method}"] = flow.ranks[name]
            magnitudes[f"{name}.{method}"] = flow.magnitudes.get(name, use_dora)
    title = "Rank of twelve layers at one budget"
    rank_heatmap(ranks, title=title, magnitudes=magnitudes).savefig(path, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "hybrid.png")
