import copy
import warnings

import peft
import pytest
import torch
from torch import nn

from rankflow.adapters.sites import find_sites
from rankflow.adapters.state_dicts import translate_state_dicts
from rankflow.adapters.stock import check_trainable, sync_config
from rankflow.errors import SiteError


class Nested(nn.Module):
    """Names of which some are the ends of others."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.block = nn.ModuleDict({"proj": nn.Linear(4, 4), "inner": nn.ModuleDict()})
        self.block["inner"]["proj"] = nn.Linear(4, 4)

    def forward(self, x):
        return self.block["inner"]["proj"](torch.tanh(self.block["proj"](torch.tanh(self.proj(x)))))


class Chain(nn.Module):
    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        for layer in self.children():
            x = torch.tanh(layer(x))
        return x


def resize(site, rank):
    A = nn.Parameter(torch.randn(rank, *site.A.shape[1:]))
    B = nn.Parameter(torch.randn(len(site.B), rank, *site.B.shape[2:]))
    site.install(A, B)


def steer(model, ranks):
    """Bring every site to its rank, as the engine would."""
    sites = find_sites(model)
    for site in sites:
        translate_state_dicts(site.layer, "default")
        resize(site, ranks[site.name])
    sync_config(model, "default", sites)
    return sites


def reload(model, folder):
    """Save by PEFT and load by PEFT onto the same base weights."""
    model.save_pretrained(folder)
    base = copy.deepcopy(model).unload()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        return peft.PeftModel.from_pretrained(base, folder)


NAMES = ("proj", "block.proj", "block.inner.proj")


@pytest.mark.parametrize("dead", [(), *[(n,) for n in NAMES], NAMES[1:], NAMES[:2]])
def test_a_kept_site_is_not_taken_for_a_dead_one_whose_name_ends_like_it(
    dead, use_dora, adapt, tmp_path
):
    model = adapt(Nested(), use_dora=use_dora, target_modules=["proj"])
    ranks = {name: 0 if name in dead else i + 1 for i, name in enumerate(NAMES)}
    steer(model, ranks)
    x = torch.randn(5, 4)
    loaded = reload(model, tmp_path)
    torch.testing.assert_close(loaded(x), model(x))
    kept = {name: max(rank, 1) for name, rank in ranks.items() if rank > 0 or use_dora}
    assert {s.name: s.rank for s in find_sites(loaded)} == kept


def test_scales_are_kept_for_every_rank_and_every_way_to_state_them(adapt, tmp_path):
    model = adapt(
        Nested(),
        target_modules=["proj"],
        use_rslora=True,
        rank_pattern={"^proj": 2, "inner.proj": 1},
        alpha_pattern={"^proj": 5},
    )
    sites = find_sites(model)
    scales = {site.name: site.scale for site in sites}
    assert len(set(scales.values())) == 3
    steer(model, {"proj": 3, "block.proj": 3, "block.inner.proj": 4})
    x = torch.randn(5, 4)
    loaded = reload(model, tmp_path)
    torch.testing.assert_close(loaded(x), model(x))
    for site in find_sites(loaded):
        assert site.scale == pytest.approx(scales[site.name], rel=1e-15)
        assert site.rank == {"proj": 3, "block.proj": 3, "block.inner.proj": 4}[site.name]


def test_a_site_that_was_never_resized_keeps_its_rank_stabilised_scale(adapt, tmp_path):
    model = adapt(Nested(), target_modules=["proj"], use_rslora=True)
    sites = find_sites(model)
    sync_config(model, "default", sites)
    x = torch.randn(5, 4)
    loaded = reload(model, tmp_path)
    torch.testing.assert_close(loaded(x), model(x))
    assert loaded.base_model.model.proj.scaling["default"] == pytest.approx(6 / 3**0.5)


@pytest.mark.parametrize("names", [("a+b", "ab"), ("x(1)", "x1"), ("w[0]", "w0"), ("p|q", "q")])
@pytest.mark.parametrize("ranks", [(1, 3), (0, 2), (2, 0)])
def test_names_with_regex_characters_mean_themselves(names, ranks, adapt, use_dora, tmp_path):
    layers = {name: nn.Linear(4, 4) for name in names}
    model = adapt(Chain(**layers), use_dora=use_dora, target_modules=list(names))
    steer(model, dict(zip(names, ranks, strict=True)))
    x = torch.randn(5, 4)
    torch.testing.assert_close(reload(model, tmp_path)(x), model(x))


def test_a_dot_in_a_pattern_is_not_any_character(adapt, tmp_path):
    base = Chain(**{"a": nn.Sequential(nn.Linear(4, 4)), "aX0": nn.Linear(4, 4)})
    model = adapt(base, target_modules=["a.0", "aX0"])
    steer(model, {"a.0": 1, "aX0": 4})
    loaded = reload(model, tmp_path)
    assert {s.name: s.rank for s in find_sites(loaded)} == {"a.0": 1, "aX0": 4}


def test_every_kind_of_layer_is_loaded_at_its_rank(mixed, use_dora, tmp_path):
    model = mixed(use_dora=use_dora)
    ranks = {"embed": 1, "fan": 2, "first": 5, "second": 4, "conv": 2}
    steer(model, ranks)
    tokens = torch.randint(11, (3, 4))
    loaded = reload(model, tmp_path)
    torch.testing.assert_close(loaded(tokens), model(tokens))
    assert {s.name: s.rank for s in find_sites(loaded)} == ranks


def test_choices_that_excluded_modules_do_not_exclude_them_twice(llama, use_dora, tmp_path):
    config = peft.LoraConfig(
        target_modules=r".*\.(q_proj|up_proj)",
        layers_to_transform=None,
        exclude_modules=["model.layers.0.mlp.up_proj"],
        use_dora=use_dora,
        init_lora_weights=False,
    )
    base = llama()
    state = copy.deepcopy(base.state_dict())
    model = peft.get_peft_model(base, config).eval()
    sites = find_sites(model)
    steer(model, {site.name: i + 1 for i, site in enumerate(sites)})
    tokens = torch.randint(13, (2, 5))
    model.save_pretrained(tmp_path)
    fresh = llama()
    fresh.load_state_dict(state)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits)
    assert [(s.name, s.rank) for s in find_sites(loaded)] == [(s.name, s.rank) for s in sites]


def test_layers_to_transform_is_resolved_into_names(llama, tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj"], layers_to_transform=[1])
    model = peft.get_peft_model(llama(), config)
    (site,) = find_sites(model)
    sync_config(model, "default", [site])
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert [s.name for s in find_sites(loaded)] == ["model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize("init", ["gaussian", "eva", "orthogonal"])
def test_an_initialisation_with_demands_is_not_repeated_when_loading(init, adapt, tmp_path):
    config = peft.LoraConfig(target_modules=["proj"], r=2)
    model = peft.get_peft_model(Nested(), config)
    model.peft_config["default"].init_lora_weights = init
    steer(model, {"proj": 3, "block.proj": 1, "block.inner.proj": 1})
    x = torch.randn(5, 4)
    torch.testing.assert_close(reload(model, tmp_path)(x), model(x))


def test_the_config_names_ranks_and_scales_of_the_live_sites_only(adapt):
    model = adapt(Nested(), target_modules=["proj"])  # scale 2
    steer(model, {"proj": 0, "block.proj": 1, "block.inner.proj": 4})
    config = model.peft_config["default"]
    assert config.rank_pattern == {r"^block\.proj": 1, r"^block\.inner\.proj": 4}
    assert config.alpha_pattern == {r"^block\.proj": 2, r"^block\.inner\.proj": 8}
    assert set(config.target_modules) == {"block.proj", "block.inner.proj"}
    assert (config.r, config.lora_alpha, config.use_rslora) == (4, 8, False)


def test_the_other_adapters_config_is_left_alone(adapt):
    model = adapt(Nested(), target_modules=["proj"])
    adapt(None, onto=model, adapter="other", target_modules=["proj"], r=2)
    before = copy.deepcopy(model.peft_config["other"].to_dict())
    steer(model, {"proj": 0, "block.proj": 1, "block.inner.proj": 4})
    assert model.peft_config["other"].to_dict() == before


def test_the_config_that_the_model_was_made_from_makes_the_same_adapter_again():
    config = peft.LoraConfig(r=3, target_modules=["proj"])
    model = peft.get_peft_model(Nested(), config)
    steer(model, {"proj": 0, "block.proj": 1, "block.inner.proj": 4})
    again = peft.get_peft_model(Nested(), config)
    assert [site.rank for site in find_sites(again)] == [3, 3, 3]
    # PEFT holds one dictionary of configs in three places.
    assert model.base_model.model.peft_config["default"] is model.peft_config["default"]


@pytest.mark.parametrize(
    ("init", "moves"),
    [
        (True, False),
        (False, False),
        ("gaussian", False),
        ("pissa", True),
        ("pissa_niter_4", True),
        ("olora", True),
        ("OLoRA", True),
    ],
)
def test_initialisations_that_move_the_base_weight_are_known(init, moves):
    base = Chain(layer=nn.Linear(4, 4))
    before = base.layer.weight.detach().clone()
    config = peft.LoraConfig(r=2, target_modules=["layer"], init_lora_weights=init)
    model = peft.get_peft_model(base, config)
    moved = not torch.equal(model.base_model.model.layer.base_layer.weight, before)
    assert moved == moves
    sites = find_sites(model)
    if not moves:
        check_trainable(model, "default", sites)
        return
    with pytest.raises(
        SiteError, match=f"init_lora_weights='{init}', which moves part of the base"
    ):
        check_trainable(model, "default", sites)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_train_beside_the_budget_are_refused(bias):
    """Saved under a site that later dies, PEFT would not load them, and would not say so."""
    config = peft.LoraConfig(r=2, target_modules=["layer"], bias=bias)
    model = peft.get_peft_model(Chain(layer=nn.Linear(4, 4)), config)
    assert model.get_base_model().layer.bias.requires_grad
    with pytest.raises(SiteError, match=f"bias='{bias}'.*set bias='none'"):
        check_trainable(model, "default", find_sites(model))


def test_a_start_whose_components_cancel_out_only_together_is_refused():
    base = Chain(layer=nn.Linear(4, 4))
    x = torch.randn(5, 4)
    before = base(x)
    config = peft.LoraConfig(r=4, target_modules=["layer"], init_lora_weights="orthogonal")
    model = peft.get_peft_model(base, config)
    torch.testing.assert_close(model(x), before)
    (site,) = find_sites(model)
    site.install(nn.Parameter(site.A[:3].detach()), nn.Parameter(site.B[:, :3].detach()))
    assert (model(x) - before).abs().max() > 1e-3
    with pytest.raises(SiteError, match="init_lora_weights='orthogonal', whose components cancel"):
        check_trainable(model, "default", [site])


def test_a_frozen_adapter_is_refused_by_the_name_of_its_first_frozen_site(adapt):
    model = adapt(Nested(), target_modules=["proj"])
    adapt(None, onto=model, adapter="other", target_modules=["proj"])
    model.set_adapter("other")
    with pytest.raises(
        SiteError, match=r"3 of 3 sites of adapter 'default' are frozen.*'proj'.*set_a"
    ):
        check_trainable(model, "default", find_sites(model, "default"))
    check_trainable(model, "other", find_sites(model, "other"))
