import json

import peft
import pytest
import torch
from safetensors import safe_open
from torch import nn
from typer.testing import CliRunner

import rankflow as rf
from rankflow.adapters.sites import find_sites
from rankflow.cli import app
from rankflow.errors import ExportError
from rankflow.export import diffusers as diffusers_format
from rankflow.export import loading
from rankflow.export.diffusion import draw_diffusion_inputs, is_diffusers_model
from rankflow.export.folder import export_folder
from rankflow.export.options import ExportOptions
from rankflow.export.report import read_report
from rankflow.specs.budget import BudgetSpec

diffusers = pytest.importorskip("diffusers")

RANKS = (3, 0, 1, 2, 4)
UNET = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}


def _unet(**config):
    return diffusers.UNet2DConditionModel(**UNET | config)


def _xl():
    return _unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=34,
    )


def _dit():
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
    )


def _sd3():
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        out_channels=4,
        pos_embed_max_size=8,
    )


def _flux():
    return diffusers.FluxTransformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )


LOADED = {"UNet": _unet, "UNet of SDXL": _xl, "SD3": _sd3, "Flux": _flux}
ALL = LOADED | {"DiT": _dit}


def seeded(make):
    torch.manual_seed(0)
    return make().eval()


def adapt(make, **config):
    """Adapt every linear layer and convolution, at ranks 0 to 4, with random numbers in them."""
    base = seeded(make)
    kinds = (nn.Linear, nn.Conv2d)
    targets = [name for name, module in base.named_modules() if isinstance(module, kinds)]
    config = {"r": 4, "lora_alpha": 6, "target_modules": targets, **config}
    model = peft.get_peft_model(base, peft.LoraConfig(**config))
    sites = [site.name for site in find_sites(model)]
    pattern = {site: RANKS[i % len(RANKS)] for i, site in enumerate(sites)}
    rf.RankFlow(model, BudgetSpec(rank=9, policy="frozen", ranks=pattern), total_steps=10)
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_magnitude_vector" in key:
                parameter.mul_(0.7 + 0.6 * torch.rand_like(parameter))
            elif ".lora_" in key:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return model.eval()


def write(model, folder, **options):
    return rf.export_adapter(model, folder, format="diffusers", options=ExportOptions(**options))


@torch.no_grad()
def denoise(model, inputs):
    return model(**inputs)[0]


def inputs_of(make):
    return draw_diffusion_inputs(seeded(make), seed=3)


@pytest.mark.parametrize("name", LOADED)
def test_diffusers_loads_ranks_scales_and_magnitudes_exactly(name, use_dora, tmp_path):
    make = LOADED[name]
    model = adapt(make, use_dora=use_dora)
    folder = write(model, tmp_path / "out")
    assert {0, 3, 4} <= {site.rank for site in find_sites(model)}
    loaded, inputs = seeded(make), inputs_of(make)
    untouched = denoise(loaded, inputs)
    prefix = "unet" if "UNet" in name else "transformer"
    loaded.load_lora_adapter(folder, prefix=prefix, use_safetensors=True)
    live = denoise(model, inputs)
    assert (denoise(loaded, inputs) - live).abs().max() < 1e-5
    assert (untouched - live).abs().max() > 1e-2
    report = read_report(folder)
    assert report.checked_by == "diffusers' load_lora_adapter"
    assert report.relative_error < 1e-5 < 1e-2 < report.adapter_effect
    assert report.largest_rank == 4


def test_a_pipeline_loads_the_unets_adapter(use_dora, tmp_path):
    model = adapt(_unet, use_dora=use_dora)
    folder = write(model, tmp_path / "out")
    pipeline = diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=seeded(_unet),
        scheduler=diffusers.PNDMScheduler(steps_offset=1, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.load_lora_weights(folder)
    inputs = inputs_of(_unet)
    assert (denoise(pipeline.unet, inputs) - denoise(model, inputs)).abs().max() < 1e-5


def test_a_pipeline_loads_the_transformers_adapter(use_dora, tmp_path):
    model = adapt(_flux, use_dora=use_dora)
    folder = write(model, tmp_path / "out")
    pipeline = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=seeded(_flux),
    )
    pipeline.load_lora_weights(folder)
    inputs = inputs_of(_flux)
    assert (denoise(pipeline.transformer, inputs) - denoise(model, inputs)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ALL)
def test_every_denoising_model_trains_prunes_and_grows_as_dora(name, tmp_path):
    base, inputs = seeded(ALL[name]), inputs_of(ALL[name])
    kinds = (nn.Linear, nn.Conv2d)
    targets = [key for key, module in base.named_modules() if isinstance(module, kinds)]
    config = peft.LoraConfig(r=4, use_dora=True, target_modules=targets)
    model = peft.get_peft_model(base, config)
    budget = rf.load_budget("reallocate", rank=2, every=4, recycle=0.3)
    flow = rf.RankFlow(model, budget, total_steps=24)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    target, losses = torch.randn_like(denoise(base, inputs)), []
    for _ in range(24):
        loss = (model(**inputs)[0] - target).square().mean()
        loss.backward()
        flow.observe()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        flow.step(optimizer)
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert any(event.pruned for event in flow.history)
    assert any(event.born for event in flow.history)
    report = read_report(rf.export_adapter(model, tmp_path / "out"))
    assert report.relative_error < 1e-5


def test_the_probe_of_sdxl_holds_what_it_takes_besides(tmp_path):
    report = read_report(write(adapt(_xl), tmp_path / "out"))
    assert report.probe.startswith("sample (2, 4, 8, 8), timestep (2,), encoder_hidden_states")
    assert (
        "added_cond_kwargs.text_embeds (2, 10), added_cond_kwargs.time_ids (2, 6)" in report.probe
    )


def test_inputs_can_be_handed_in(tmp_path):
    inputs = inputs_of(_xl)
    report = read_report(write(adapt(_xl), tmp_path / "out", inputs=inputs))
    assert report.probe == "the caller's inputs"
    assert report.adapter_effect > 1e-2


def test_the_header_tells_only_what_any_peft_understands(tmp_path):
    folder = write(adapt(_unet, use_dora=True), tmp_path / "out")
    with safe_open(folder / "pytorch_lora_weights.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
        assert all(key.startswith("unet.") for key in (*file.keys(), *header))
    config = {key.removeprefix("unet."): value for key, value in header.items()}
    assert config.keys() == {
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "use_dora",
    }
    ranks = set(config["rank_pattern"].values())
    assert ranks == {1, 2, 3, 4}  # a dead DoRA site has one component of zeros
    assert config["alpha_pattern"] == {k: 1.5 * r for k, r in config["rank_pattern"].items()}


def test_the_folder_of_format_peft_is_no_folder_for_diffusers(tmp_path):
    """What `loads_in` does not claim: its scales are lost, without a word."""
    model = adapt(_unet)
    folder = rf.export_adapter(model, tmp_path / "out")
    assert "diffusers" not in read_report(folder).loads_in
    loaded, inputs = seeded(_unet), inputs_of(_unet)
    loaded.load_lora_adapter(
        folder, weight_name="adapter_model.safetensors", prefix="base_model.model"
    )
    assert (denoise(loaded, inputs) - denoise(model, inputs)).abs().max() > 1e-3


def test_a_lost_header_is_caught_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(diffusers_format, "_HEADER", "another_key")
    with pytest.raises(ExportError, match="that PEFT loads at site"):
        write(adapt(_unet), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_models_into_which_diffusers_loads_no_adapter_are_refused(make_adapted, tmp_path):
    with pytest.raises(ExportError, match="LlamaForCausalLM, which is no model of diffusers"):
        write(make_adapted(), tmp_path / "out")
    with pytest.raises(ExportError, match="loads no adapters into a DiTTransformer2DModel"):
        write(adapt(_dit), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_trains_more_than_its_sites_is_refused(tmp_path):
    base = seeded(_unet)
    config = peft.LoraConfig(target_modules=["to_q"], modules_to_save=["conv_out"])
    with pytest.raises(ExportError, match=r"trains 'conv_out.bias' beside its sites"):
        write(peft.get_peft_model(base, config), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_live_model_is_left_as_it_was(tmp_path, snapshot, assert_same):
    model = adapt(_sd3, use_dora=True).train()
    before = snapshot(model)
    write(model, tmp_path / "out")
    assert_same(before, snapshot(model))


def save_base(folder):
    seeded(_unet).save_pretrained(folder)
    return folder


def test_the_command_line_turns_an_adapter_folder_into_one_for_diffusers(use_dora, tmp_path):
    model = adapt(_unet, use_dora=use_dora)
    adapter = rf.export_adapter(model, tmp_path / "adapter")
    base = save_base(tmp_path / "base")
    arguments = ["--output", tmp_path / "out", "--format", "diffusers", "--base", base]
    result = CliRunner().invoke(app, ["export", str(adapter), *map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert "loaded by diffusers' load_lora_adapter" in result.output
    loaded, inputs = seeded(_unet), inputs_of(_unet)
    loaded.load_lora_adapter(tmp_path / "out", prefix="unet", use_safetensors=True)
    assert (denoise(loaded, inputs) - denoise(model, inputs)).abs().max() < 1e-5


def test_dora_reaches_diffusers_as_plain_lora_too(tmp_path):
    model = adapt(_unet, use_dora=True)
    adapter = rf.export_adapter(model, tmp_path / "adapter")
    base, options = str(save_base(tmp_path / "base")), ExportOptions(max_error=1e-4)
    plain = export_folder(
        adapter, tmp_path / "svd", format="lora-svd", base_model=base, options=options
    )
    folder = export_folder(plain, tmp_path / "out", format="diffusers", base_model=base)
    loaded, inputs = seeded(_unet), inputs_of(_unet)
    loaded.load_lora_adapter(folder, prefix="unet", use_safetensors=True)
    assert (denoise(loaded, inputs) - denoise(model, inputs)).abs().max() < 1e-3


def test_without_diffusers_the_base_of_an_adapter_folder_is_refused(tmp_path, monkeypatch):
    adapter = rf.export_adapter(adapt(_unet), tmp_path / "adapter")
    base = save_base(tmp_path / "base")
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"not installed; install it by .*rankflow\[diffusers\]"):
        export_folder(adapter, tmp_path / "out", format="diffusers", base_model=str(base))


def test_a_model_that_is_not_of_diffusers_is_told_apart():
    assert is_diffusers_model(seeded(_dit))
    assert not is_diffusers_model(nn.Linear(2, 2))


def test_a_base_in_half_precision_is_compared_to_its_rounding(use_dora, tmp_path):
    model = adapt(lambda: _unet().bfloat16(), use_dora=use_dora)
    report = read_report(write(model, tmp_path / "out"))
    assert report.relative_error < report.tolerance == 5e-2 < report.adapter_effect
