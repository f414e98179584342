import pytest
import torch

from rankflow.adapters.base_weight import base_rows
from rankflow.adapters.sites import find_sites
from rankflow.analysis.base_rows import read_base_rows
from rankflow.errors import RankFlowError


@pytest.mark.parametrize("prefix", ["", "outer."])
def test_weights_are_those_under_the_sites(transformer, prefix, adapt, tmp_path):
    base = transformer()
    base.save_pretrained(tmp_path)
    sites = find_sites(adapt(base, target_modules="all-linear", r=2))
    rows = read_base_rows(str(tmp_path), [prefix + site.name for site in sites])
    assert len(rows) == len(sites)
    for site in sites:
        assert torch.equal(rows[prefix + site.name], base_rows(site.layer))


def test_nothing_is_loaded_where_no_weight_is_needed():
    assert read_base_rows("nowhere", []) == {}


def test_a_model_that_does_not_fit_is_refused(llama, tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(RankFlowError, match=r"has no weight at site 'model\.layers\.0\.query'"):
        read_base_rows(str(tmp_path), ["model.layers.0.query"])
    with pytest.raises(RankFlowError, match="give it with --base"):
        read_base_rows("", ["q"])
