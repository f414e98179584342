import copy
import json
import warnings
from itertools import product

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankflow.adapters.magnitude import empty_magnitude
from rankflow.adapters.sites import find_sites
from rankflow.adapters.state_dicts import translate_state_dicts
from rankflow.adapters.stock import sync_config
from rankflow.export.inspect import FACTS, inspect_adapter
from rankflow.export.peft import export_adapter

# Rank and whether the magnitude is on; every kind of layer has one site in each state.
STATES = list(product((0, 2), (False, True)))
KINDS = {
    "linear": lambda: nn.Linear(6, 5),
    "unbiased": lambda: nn.Linear(6, 5, bias=False),
    "transposed": lambda: Conv1D(5, 6),
    "conv1d": lambda: nn.Conv1d(3, 6, 3, padding=1),
    "conv2d": lambda: nn.Conv2d(3, 6, (3, 2), padding=1),
    "conv3d": lambda: nn.Conv3d(2, 5, 2),
    "embedding": lambda: nn.Embedding(11, 6),
}
INPUTS = {
    "linear": lambda: torch.randn(7, 6),
    "unbiased": lambda: torch.randn(7, 6),
    "transposed": lambda: torch.randn(7, 6),
    "conv1d": lambda: torch.randn(2, 3, 8),
    "conv2d": lambda: torch.randn(2, 3, 6, 5),
    "conv3d": lambda: torch.randn(2, 2, 4, 3, 4),
    "embedding": lambda: torch.randint(11, (3, 4)),
}


class Everything(nn.Module):
    """Every kind of layer in every state, side by side."""

    def __init__(self):
        super().__init__()
        self.kinds = nn.ModuleDict(
            {kind: nn.ModuleList(make() for _ in STATES) for kind, make in KINDS.items()}
        )

    def forward(self, inputs):
        return torch.cat(
            [
                layer(inputs[kind]).flatten()
                for kind, layers in self.kinds.items()
                for layer in layers
            ]
        )


def inputs():
    torch.manual_seed(1)
    made = {kind: draw() for kind, draw in INPUTS.items()}
    return {kind: x.double() if x.is_floating_point() else x for kind, x in made.items()}


def make_base():
    torch.manual_seed(0)
    return Everything().double()


def set_state(site, rank, *, on):
    A = torch.randn(rank, *site.A.shape[1:], dtype=torch.float64)
    B = torch.randn(len(site.B), rank, *site.B.shape[2:], dtype=torch.float64)
    m = site.magnitude.detach()
    m = m * (0.5 + torch.rand_like(m)) if on else empty_magnitude(m)
    site.install(nn.Parameter(A), nn.Parameter(B), magnitude=nn.Parameter(m))


def make_model(states=STATES, adapter="default"):
    """Adapt all layers by DoRA, and bring them to their states as the engine would."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        config = peft.LoraConfig(
            r=3, lora_alpha=5, use_dora=True, target_modules=r"kinds\.\w+\.\d+"
        )
        model = peft.get_peft_model(make_base(), config, adapter_name=adapter).double()
    sites = find_sites(model, adapter)
    torch.manual_seed(2)
    for i, site in enumerate(sites):
        rank, on = states[i % len(states)]
        set_state(site, rank, on=on)
        translate_state_dicts(site.layer, adapter)
    sync_config(model, adapter, sites)
    return model, sites


def load_stock(folder):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        return peft.PeftModel.from_pretrained(make_base(), folder)


def describe(site):
    return site.rank, site.magnitude is not None


def write(how, model, folder):
    if how == "save_pretrained":
        model.save_pretrained(folder)
    else:
        export_adapter(model, folder)


@pytest.fixture(params=["save_pretrained", "export_adapter"])
def how(request):
    return request.param


# --- saved and loaded by stock PEFT


def test_every_state_of_every_kind_of_layer_reads_back_to_the_same_outputs(how, tmp_path):
    model, sites = make_model()
    assert [describe(site) for site in sites] == STATES * len(KINDS)
    before = model(inputs())
    write(how, model, tmp_path / "adapter")
    loaded = load_stock(tmp_path / "adapter")
    base = make_base()(inputs())
    assert ((before - base).abs() > 1e-3).float().mean() > 0.6
    torch.testing.assert_close(loaded(inputs()), before, rtol=1e-12, atol=1e-12)
    assert [describe(site) for site in sites] == STATES * len(KINDS)
    torch.testing.assert_close(model(inputs()), before, rtol=0, atol=0)
    merged = loaded.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(merged(inputs()), before, rtol=1e-11, atol=1e-11)


def test_each_state_is_saved_as_what_stock_peft_has_for_it(tmp_path):
    model, sites = make_model()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    found = {site.name: site for site in inspect_adapter(tmp_path).sites}
    for site in sites:
        if describe(site) == (0, False):
            assert site.name not in found
            continue
        assert found[site.name].rank == found[site.name].config_rank == max(site.rank, 1)
        assert found[site.name].has_magnitude
        assert found[site.name].scale == pytest.approx(5 / 3)
    assert len(found) == 3 * len(KINDS)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"]
    assert all(torch.isfinite(t).all() and t.numel() > 0 for t in tensors.values())


@pytest.mark.parametrize("states", [[(2, False), (0, False)], [(2, False)]])
def test_where_every_magnitude_is_off_the_saved_adapter_is_plain_lora(how, states, tmp_path):
    model, sites = make_model(states)
    before = model(inputs())
    write(how, model, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not any("magnitude" in key for key in tensors)
    assert sum(t.numel() for t in tensors.values()) == sum(site.parameters for site in sites)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["use_dora"] is False
    loaded = load_stock(tmp_path / "adapter")
    torch.testing.assert_close(loaded(inputs()), before, rtol=1e-12, atol=1e-12)
    assert not any(key.endswith("magnitude_vector") for key, _ in loaded.named_parameters())


def test_a_magnitude_that_is_turned_on_again_is_saved_again(tmp_path):
    model, sites = make_model([(2, False)])
    model.save_pretrained(tmp_path / "off")
    slot = sites[0].magnitude_slot
    m = torch.rand(5, dtype=torch.float64) + 1
    sites[0].install(sites[0].A, sites[0].B, magnitude=nn.Parameter(m))
    assert sites[0].magnitude is not slot
    sync_config(model, "default", sites)
    before = model(inputs())
    model.save_pretrained(tmp_path / "on")
    torch.testing.assert_close(load_stock(tmp_path / "on")(inputs()), before, rtol=1e-12, atol=0)


def test_an_adapter_of_another_name_reads_back(tmp_path):
    model, _ = make_model(adapter="mine")
    before = model(inputs())
    export_adapter(model, tmp_path / "adapter", adapter_name="mine")
    loaded = load_stock(tmp_path / "adapter")
    torch.testing.assert_close(loaded(inputs()), before, rtol=1e-12, atol=1e-12)


def test_the_own_file_tells_what_was_trained_and_what_is_stored(tmp_path):
    model, sites = make_model()
    folder = export_adapter(model, tmp_path / "adapter")
    own = json.loads((folder / FACTS).read_text())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    stored = sum(t.numel() for t in load_file(folder / "adapter_model.safetensors").values())
    assert own["trained_parameters"] == trained == sum(site.parameters for site in sites)
    assert own["stored_parameters"] == stored > trained
    card = (folder / "README.md").read_text()
    assert f"The file holds {stored:,} parameters and {trained:,} are trained" in card
    summary = inspect_adapter(folder)
    assert (summary.trained_parameters, summary.parameters) == (trained, stored)


# --- loaded back into the live model


def test_a_state_dict_goes_back_into_its_own_model_strictly():
    model, sites = make_model()
    before = model(inputs())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert all(value.numel() > 0 for value in state.values())
    for p in model.parameters():
        p.data += 1
    assert model.load_state_dict(state, strict=True) == ([], [])
    assert [describe(site) for site in sites] == STATES * len(KINDS)
    torch.testing.assert_close(model(inputs()), before, rtol=0, atol=0)


@pytest.mark.parametrize("states", [STATES, [(2, False), (0, False)]])
def test_a_saved_adapter_goes_back_into_a_live_model_of_the_same_states(states, tmp_path):
    model, _ = make_model(states)
    before = model(inputs())
    model.save_pretrained(tmp_path)
    twin, sites = make_model(states)
    for site in sites:
        site.A.data += 1
        site.B.data += 1
        site.magnitude_slot.data += 1
    assert not torch.allclose(twin(inputs()), before)
    result = twin.load_adapter(tmp_path, "default", is_trainable=True)
    assert not [key for key in result.missing_keys if ".lora_" in key]
    assert not result.unexpected_keys
    torch.testing.assert_close(twin(inputs()), before, rtol=1e-12, atol=1e-12)
    expected = [states[i % len(states)] for i in range(len(sites))]
    assert [describe(site) for site in sites] == expected
    assert all(site.magnitude_slot.requires_grad for site in sites)


def test_the_hooks_are_registered_once_and_outlive_the_adapter():
    model, sites = make_model()
    for site in sites:
        translate_state_dicts(site.layer, "default")
    assert {len(site.layer._state_dict_hooks) for site in sites} == {1}
    twin = copy.deepcopy(model)
    twin.add_adapter("other", peft.LoraConfig(r=1, target_modules=[r"kinds.linear.0"]))
    twin.set_adapter("other")
    twin.delete_adapter("default")
    assert not [key for key in twin.state_dict() if ".default" in key]
