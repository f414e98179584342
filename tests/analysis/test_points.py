import numpy as np
import peft
import pytest

from rankflow.analysis import points as module
from rankflow.analysis.checkpoints import Checkpoint
from rankflow.analysis.points import choose_sites, measure_run
from rankflow.analysis.weights import Pair, load_weights
from rankflow.errors import RankFlowError

QUERY = "encoder.layer.0.attention.self.query"
VALUE = "encoder.layer.0.attention.self.value"


@pytest.fixture
def base(base_folder):
    return load_weights(str(base_folder))


@pytest.fixture
def measure(base, monkeypatch, tmp_path):
    """Measure a run whose checkpoints scale weights by factors; None is its end."""

    def run(*changes):
        factors = [change for _, change in changes]

        def read_pairs(base, checkpoint, wanted):
            before = np.arange(1, 7, dtype=np.float32).reshape(2, 3)
            for site, factor in factors[int(checkpoint.folder.name)].items():
                if site in wanted:
                    yield Pair(site, before, factor * before)

        monkeypatch.setattr(module, "read_pairs", read_pairs)
        checkpoints = [
            Checkpoint(tmp_path / str(i), "adapter", step) for i, (step, _) in enumerate(changes)
        ]
        return measure_run("run", tmp_path, checkpoints, base, frozenset(base.layers))

    return run


def table(run):
    return {(p.site, run.moments[p.moment].label): p.change.dM / p.change.norm for p in run.points}


def test_all_layers_but_the_embeddings_are_compared(base):
    chosen = choose_sites(base, None)
    assert len(chosen) == 4 * 6 + 1
    assert not any("embeddings" in site for site in chosen)


@pytest.mark.parametrize(("match", "count"), [("query", 4), (r"\.[01]\..*value", 2), ("emb", 3)])
def test_what_matches_is_compared_embeddings_too(match, count, base):
    assert len(choose_sites(base, match)) == count


@pytest.mark.parametrize(
    ("match", "message"),
    [
        ("q_proj", r"matches none of the base model's 28 weights; did you mean '"),
        ("atention.self.query", "did you mean 'attention.self.query'"),
        ("(query", "is not a regular expression"),
    ],
)
def test_a_pattern_that_finds_nothing_is_refused(match, message, base):
    with pytest.raises(RankFlowError, match=message):
        choose_sites(base, match)


def test_a_run_has_a_point_for_each_weight_at_each_moment_in_order(measure):
    run = measure((5, {VALUE: 1.5, QUERY: 2.0}), (10, {QUERY: 3.0, VALUE: 1.25}))
    assert run.sites == (QUERY, VALUE)  # the model's order
    assert table(run) == pytest.approx(
        {
            (QUERY, "step 5"): 1.0,
            (VALUE, "step 5"): 0.5,
            (QUERY, "step 10"): 2.0,
            (VALUE, "step 10"): 0.25,
        }
    )


def test_a_weight_that_an_adapter_no_longer_adapts_is_a_point_without_change(measure):
    run = measure((5, {QUERY: 2.0, VALUE: 1.5}), (10, {QUERY: 3.0}))
    (point,) = [p for p in run.points if p.site == VALUE and p.moment == 1]
    assert (point.change.dM, point.change.dD, point.change.is_nothing) == (0, 0, True)
    assert point.change.norm > 0


def test_a_weight_that_never_moves_is_no_part_of_the_run(measure):
    assert measure((5, {QUERY: 2.0, VALUE: 1.0}), (10, {QUERY: 3.0, VALUE: 1.0})).sites == (QUERY,)


@pytest.mark.parametrize(
    ("end", "moments"),
    [
        ({QUERY: 3.0}, ["step 5", "step 10"]),
        ({QUERY: 3.00001, VALUE: 1.0}, ["step 5", "step 10"]),
        ({QUERY: 2.0}, ["step 5", "step 10"]),  # the best model, loaded at the end
        ({QUERY: 3.1}, ["step 5", "step 10", "end"]),
        ({QUERY: 3.0, VALUE: 1.5}, ["step 5", "step 10", "end"]),
    ],
)
def test_the_end_is_left_out_where_it_is_one_of_the_checkpoints(end, moments, measure):
    run = measure((5, {QUERY: 2.0}), (10, {QUERY: 3.0}), (None, end))
    assert [moment.label for moment in run.moments] == moments


def test_a_run_that_moved_nothing_is_refused(measure):
    with pytest.raises(RankFlowError, match=r"has moved none of the 28 weights.*widen --match"):
        measure((5, {QUERY: 1.0}), (10, {}))


def test_an_untrained_adapter_has_moved_nothing(bert, base, tmp_path):
    config = peft.LoraConfig(target_modules=["query"], use_dora=True)
    peft.get_peft_model(bert, config).save_pretrained(tmp_path / "adapter")
    checkpoint = Checkpoint(tmp_path / "adapter", "adapter", None)
    with pytest.raises(RankFlowError, match="has moved none of the 4 weights"):
        measure_run("run", tmp_path, [checkpoint], base, choose_sites(base, "query"))
