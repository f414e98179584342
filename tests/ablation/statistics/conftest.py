"""Pairs and tables made by hand."""

import numpy as np
import pytest

from rankflow.ablation.statistics.table import Pairs, ScoreTable


def _pairs(*differences):
    """One array of differences for each task."""
    sizes = [len(d) for d in differences]
    return Pairs(
        difference=np.concatenate([np.asarray(d, dtype=np.float64) for d in differences]),
        task=np.repeat([f"task{t}" for t in range(len(sizes))], sizes),
        seed=np.concatenate([np.arange(size) for size in sizes]),
        broken=0,
        diverged={"ours": 0, "theirs": 0},
        unpaired=0,
    )


def _table(scores, **settings):
    """Scores ``{method: {task: [by seed]}}``; None is a cell that was not measured."""
    values = {
        (method, task, seed): score
        for method, tasks in scores.items()
        for task, row in tasks.items()
        for seed, score in enumerate(row)
        if score is not None
    }
    return ScoreTable(values, "test NLL", **settings)


@pytest.fixture
def make_pairs():
    return _pairs


@pytest.fixture
def make_table():
    return _table
