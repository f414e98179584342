import pytest

from rankflow.analysis.naming import Renaming, match_names

ENCODER = [f"encoder.layer.{i}.attention.{kind}" for i in range(3) for kind in ("query", "value")]
BOTH = [f"{side}.layers.{i}.fc" for side in ("encoder", "decoder") for i in range(2)]


def under(prefix, names=ENCODER):
    return [f"{prefix}.{name}" for name in names]


@pytest.mark.parametrize(
    ("theirs", "ours", "expected"),
    [
        (ENCODER, ENCODER, Renaming("", "")),
        (under("bert"), ENCODER, Renaming("bert", "")),
        (ENCODER, under("bert"), Renaming("", "bert")),
        (under("encoder"), ENCODER, Renaming("encoder", "")),
        (under("module.model"), under("bert"), Renaming("module.model", "bert")),
        ([*under("bert"), "classifier"], [*ENCODER, "pooler.dense"], Renaming("bert", "")),
        ([*under("bert"), "classifier"], [*under("bert"), "cls.decoder"], Renaming("", "")),
        (BOTH[:2], BOTH, Renaming("", "")),
        (BOTH[2:], BOTH, Renaming("", "")),
        (ENCODER[2:3], ENCODER, Renaming("", "")),
        (["wte", "lm_head"], ENCODER, None),
        ([], ENCODER, None),
    ],
)
def test_one_pair_of_beginnings_translates_all_names(theirs, ours, expected):
    assert match_names(theirs, ours) == expected


@pytest.mark.parametrize("prefix", ["bert", "wrapped.model"])
def test_names_are_translated_and_strangers_are_not(prefix):
    renaming = match_names(under(prefix), ENCODER)
    assert [renaming.translate(name) for name in under(prefix)] == ENCODER
    assert renaming.translate("classifier") is None
    assert renaming.translate(f"{prefix}x.encoder") is None
