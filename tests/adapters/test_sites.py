import copy
import warnings

import peft
import pytest
import torch
import transformers
from torch import nn

from rankflow.adapters.dead import DeadVariant
from rankflow.adapters.sites import Site, find_sites
from rankflow.errors import RankFlowError, SiteError


def install_rank(site, rank):
    """Give a site factors of another rank, as surgery would."""
    A = nn.Parameter(site.A.new_zeros((rank, *site.A.shape[1:])))
    B = nn.Parameter(site.B.new_ones((len(site.B), rank, *site.B.shape[2:])))
    site.install(A, B)
    return A, B


def dense_update(model, case):
    """What the adapter adds to the weight, as a matrix: the difference that merging makes."""
    plain = copy.deepcopy(model)
    before = plain.base_model.model.block["layer"].base_layer.weight.detach().clone()
    plain.merge_adapter()
    after = plain.base_model.model.block["layer"].base_layer.weight.detach()
    return case.matrix(after - before)


# --- the uniform view


def test_scale_times_both_factors_is_the_update_of_every_kind_of_layer(layer_case, host, adapt):
    model = adapt(host(layer_case)).double()
    (site,) = find_sites(model)
    update = site.scale * site.B.flatten(1) @ site.A.flatten(1)
    torch.testing.assert_close(update, dense_update(model, layer_case), rtol=1e-12, atol=1e-12)


def test_a_site_counts_what_it_trains(layer_case, host, adapt, use_dora):
    model = adapt(host(layer_case), use_dora=use_dora)
    (site,) = find_sites(model)
    info = site.describe()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert site.parameters == trainable
    assert info.fixed_cost + site.rank * info.component_cost == trainable
    weight = layer_case.matrix(site.layer.get_base_layer().weight)
    assert (info.out_features, info.in_features) == tuple(weight.shape)
    assert (info.kind, info.has_magnitude) == (layer_case.kind, use_dora)
    assert info.fixed_cost == (info.out_features if use_dora else 0)


def test_rank_bounds_are_cut_to_what_the_matrix_holds(layer_cases, host, adapt):
    (site,) = find_sites(adapt(host(layer_cases["linear"])))  # a matrix of (5, 6)
    assert (site.describe().min_rank, site.describe().max_rank) == (0, 5)
    assert (site.describe(2, 4).min_rank, site.describe(2, 4).max_rank) == (2, 4)
    assert (site.describe(9, 20).min_rank, site.describe(9, 20).max_rank) == (5, 5)


def test_names_run_from_the_base_models_root_in_module_order(mixed, use_dora):
    sites = find_sites(mixed(use_dora=use_dora))
    assert [site.name for site in sites] == ["embed", "fan", "first", "second", "conv"]
    assert [site.kind for site in sites] == ["embedding", "linear", "linear", "linear", "conv"]


def test_every_linear_layer_of_a_transformer_becomes_a_site(transformer, use_dora):
    base = transformer()
    linear = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | transformers.pytorch_utils.Conv1D)
        and module is not base.get_output_embeddings()
        and not name.startswith("classifier")  # PEFT leaves heads to modules_to_save
    ]
    config = peft.LoraConfig(
        task_type="SEQ_CLS" if "classifier" in dict(base.named_modules()) else None,
        target_modules="all-linear",
        use_dora=use_dora,
        fan_in_fan_out=isinstance(base, transformers.GPT2LMHeadModel),
    )
    model = peft.get_peft_model(base, config)
    sites = find_sites(model)
    assert [site.name for site in sites] == linear
    assert all(model.get_base_model().get_submodule(s.name) is s.layer for s in sites)


def test_only_the_named_adapter_is_steered(mixed, adapt):
    model = mixed(r=3)
    adapt(None, onto=model, adapter="other", r=2, target_modules=["first", "conv"], use_dora=True)
    others = find_sites(model, "other")
    assert [(s.name, s.rank, s.magnitude is not None) for s in others] == [
        ("first", 2, True),
        ("conv", 2, True),
    ]
    mine = find_sites(model, "default")
    assert [s.rank for s in mine] == [3] * 5
    assert all(s.magnitude is None for s in mine)

    before = {name: p.clone() for name, p in model.named_parameters() if ".default" in name}
    first = others[0].layer
    for site in others:
        install_rank(site, 0)
    assert {s.rank for s in mine} == {3}
    assert first.r == {"default": 3, "other": 1}
    assert list(first.lora_variant) == ["other"]
    for name, value in before.items():
        assert torch.equal(model.get_parameter(name), value)


def test_a_site_sees_a_parameter_that_was_replaced_behind_its_back(mixed):
    site = find_sites(mixed())[2]
    site.layer.lora_A["default"].weight = nn.Parameter(torch.full((3, 5), 7.0))
    assert site.A[0, 0] == 7.0


# --- what cannot be steered


def test_a_bare_model_is_refused():
    with pytest.raises(SiteError, match=r"steers a peft.PeftModel, received Linear; call peft.get"):
        find_sites(nn.Linear(2, 2))


def test_an_unknown_adapter_is_refused_with_the_known_ones(mixed):
    with pytest.raises(SiteError, match=r"no adapter 'mine'; it has \['default'\]"):
        find_sites(mixed(), "mine")


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (peft.IA3Config(target_modules=["layer"], feedforward_modules=[]), "IA3"),
        (peft.LoHaConfig(target_modules=["layer"]), "LOHA"),
        (peft.AdaLoraConfig(target_modules=["layer"], total_step=100), "ADALORA"),
    ],
    ids=["IA3", "LoHa", "AdaLoRA"],
)
def test_another_peft_type_is_refused(config, kind, host, layer_cases):
    model = peft.get_peft_model(host(layer_cases["linear"]), config)
    with pytest.raises(SiteError, match=f"'default' is of type {kind}, and only LORA"):
        find_sites(model)


@pytest.mark.parametrize(
    ("config", "variant"),
    [
        ({"alora_invocation_tokens": [1]}, "ALoraLinearVariant"),
        ({"init_lora_weights": "mica", "r": 2}, "MiCALinearVariant"),
    ],
)
def test_an_unsupported_variant_is_refused_by_the_sites_name(config, variant, llama):
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj"], **config)
    with pytest.raises(
        SiteError, match=rf"site 'model.layers.0.self_attn.v_proj' uses {variant}.*use_dora=True"
    ):
        find_sites(peft.get_peft_model(llama(), config))


def test_an_adapter_bias_is_refused(host, layer_cases):
    config = peft.LoraConfig(target_modules=["layer"], lora_bias=True)
    model = peft.get_peft_model(host(layer_cases["linear"]), config)
    with pytest.raises(SiteError, match=r"site 'block.layer' was made with lora_bias=True"):
        find_sites(model)


def test_a_grouped_convolution_is_refused():
    base = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3, groups=2)})
    config = peft.LoraConfig(r=2, target_modules=["conv"])
    with pytest.warns(UserWarning, match="groups > 1. Merging is not supported"):
        model = peft.get_peft_model(base, config)
    with pytest.raises(SiteError, match=r"site 'conv' is a convolution with groups=2"):
        find_sites(model)


@pytest.mark.parametrize("odd", [{"dilation": 2}, {"padding_mode": "reflect", "padding": 1}])
def test_a_convolution_whose_forward_and_merge_differ_in_peft_is_refused(odd):
    base = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3, **odd)})
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["conv"]))
    with pytest.raises(SiteError, match=r"site 'conv' is a convolution with dilation=.*differ"):
        find_sites(model)


def test_multihead_attention_is_refused():
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["attention"]))
    with pytest.raises(SiteError, match=r"site 'attention' is a MultiheadAttention.*cannot resize"):
        find_sites(model)


def test_an_adapted_bare_parameter_is_refused():
    base = nn.ModuleDict({"experts": nn.Linear(4, 4)})
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.weight"])
    model = peft.get_peft_model(base, config)
    with pytest.raises(SiteError, match=r"site 'experts' adapts the parameter.*target_parameters"):
        find_sites(model)


def test_an_unknown_kind_of_factor_is_refused(mixed):
    model = mixed()
    model.base_model.model.first.lora_A["default"] = nn.Bilinear(1, 1, 1)
    with pytest.raises(SiteError, match=r"site 'first' has an adapter of type Bilinear"):
        find_sites(model)


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_sites_that_share_a_tensor_are_refused(factor):
    base = nn.ModuleDict({"left": nn.Linear(3, 3), "right": nn.Linear(3, 3)})
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["left", "right"]))
    getattr(base["right"], factor)["default"].weight = getattr(base["left"], factor)[
        "default"
    ].weight
    with pytest.raises(SiteError, match=r"sites 'left' and 'right' share one adapter tensor"):
        find_sites(model)


def test_tied_embeddings_with_tied_adapters_are_refused():
    config = transformers.LlamaConfig(
        vocab_size=13,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    adapter = peft.LoraConfig(
        r=2, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True
    )
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), adapter)
    with pytest.raises(SiteError, match=r"share one adapter tensor.*ensure_weight_tying=False"):
        find_sites(model)


def test_an_adapter_without_layers_is_refused(mixed, adapt):
    model = mixed()
    adapt(None, onto=model, adapter="gone", target_modules=["first"])
    model.base_model.model.first.delete_adapter("gone")
    with pytest.raises(SiteError, match=r"'gone' adapts no layer of MixedNet; check target_modul"):
        find_sites(model, "gone")


def test_a_site_error_is_caught_as_a_rankflow_error():
    with pytest.raises(RankFlowError):
        find_sites(nn.Identity())


# --- PEFT's own record of rank and scale


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("rank", [0, 1, 2, 5])
def test_pefts_rescaling_finds_the_old_scale_after_a_resize(
    rank, use_rslora, layer_case, host, adapt, use_dora
):
    model = adapt(host(layer_case), use_dora=use_dora, use_rslora=use_rslora)
    (site,) = find_sites(model)
    scale = site.scale
    assert scale == pytest.approx(6 / (3**0.5 if use_rslora else 3))
    A, B = install_rank(site, rank)
    assert site.A is A
    assert site.B is B
    assert site.rank == rank
    assert site.scale == scale
    layer = site.layer
    for reset in (
        lambda: layer.set_scale("default", 1),
        layer.unscale_layer,
        lambda: (layer.scale_layer(0.5), layer.unscale_layer(0.5)),
        lambda: (layer.scale_layer(3.0), layer.unscale_layer()),
    ):
        reset()
        assert site.scale == pytest.approx(scale, rel=1e-15)
    layer.set_scale("default", 2)
    assert site.scale == pytest.approx(2 * scale, rel=1e-15)
    if site.kind != "embedding":  # PEFT's unscale_layer passes embeddings over
        layer.unscale_layer()
        assert site.scale == pytest.approx(scale, rel=1e-15)


def test_the_wrapped_modules_know_their_new_size(layer_case, host, adapt):
    (site,) = find_sites(adapt(host(layer_case)))
    install_rank(site, 2)
    if site.kind == "embedding":
        return
    modules = (site.layer.lora_A["default"], site.layer.lora_B["default"])
    sizes = [
        (m.in_channels, m.out_channels) if site.kind == "conv" else (m.in_features, m.out_features)
        for m in modules
    ]
    assert (sizes[0][1], sizes[1][0]) == (2, 2)
    assert [sizes[0][0], sizes[1][1]] == [site.A.shape[1], site.B.shape[0]]


def test_a_site_gets_its_own_variant_back_when_it_is_revived(layer_case, host, adapt, use_dora):
    (site,) = find_sites(adapt(host(layer_case), use_dora=use_dora))
    before = dict(site.layer.lora_variant)
    assert bool(before) == use_dora
    for rank in (0, 0, 2, 0, 1):
        install_rank(site, rank)
        variant = site.layer.lora_variant.get("default")
        assert isinstance(variant, DeadVariant) == (rank == 0)
        assert rank == 0 or dict(site.layer.lora_variant) == before


def test_a_dead_site_is_found_again(mixed, use_dora):
    model = mixed(use_dora=use_dora)
    for site in find_sites(model):
        install_rank(site, 0)
    again = find_sites(model)
    assert [s.rank for s in again] == [0] * 5
    assert [s.kind for s in again] == ["embedding", "linear", "linear", "linear", "conv"]


def test_a_site_needs_no_gradient_mode_or_warning_to_be_read(mixed):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sites = find_sites(mixed(use_dora=True))
    assert all(isinstance(s, Site) and s.magnitude.requires_grad for s in sites)
