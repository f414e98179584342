import pytest

from rankflow.records import ComponentChange, RankEvent

QUERY, VALUE, HEAD = "layers.0.attn.query", "layers.0.attn.value", "head"


@pytest.fixture
def event() -> RankEvent:
    """One event of a model with three sites: 10 components, 3 pruned, 1 born."""
    return RankEvent(
        index=3,
        step=120,
        limit=165_888,
        spent_before=200_000,
        spent=165_120,
        ranks_before={QUERY: 6, VALUE: 2, HEAD: 2},
        ranks={QUERY: 6, VALUE: 0, HEAD: 2},
        importance={QUERY: 0.1 + 0.2, VALUE: 1e-30, HEAD: 0.7},
        pruned=(
            ComponentChange(VALUE, 0, 1e-31, "below the threshold"),
            ComponentChange(VALUE, 1, float("-inf"), "below the threshold"),
            ComponentChange(QUERY, 5, 0.0, "below the threshold"),
        ),
        born=(ComponentChange(QUERY, 5, 2.5, "demand"),),
        seconds=0.0125,
    )
