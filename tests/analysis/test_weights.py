import copy
import warnings
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import nn

from rankflow.adapters.sites import find_sites
from rankflow.analysis.checkpoints import find_checkpoints
from rankflow.analysis.weights import load_weights, read_pairs
from rankflow.engine import RankFlow
from rankflow.errors import RankFlowError
from rankflow.export.peft import export_adapter
from rankflow.specs.budget import BudgetSpec

LINEAR = ["query", "key", "value", "dense"]
CONFIGS = {
    "LoRA": peft.LoraConfig(r=3, lora_alpha=7, target_modules=LINEAR),
    "DoRA": peft.LoraConfig(r=3, lora_alpha=7, target_modules=LINEAR, use_dora=True),
    "rank-stabilised": peft.LoraConfig(r=3, target_modules=["query"], use_rslora=True),
    "patterns": peft.LoraConfig(
        r=3,
        target_modules=r".*layer\.[12]\..*(query|dense)",
        rank_pattern={r"1\..*query": 5},
        alpha_pattern={"dense": 1},
    ),
    "AdaLoRA": peft.AdaLoraConfig(target_modules=LINEAR, init_r=4, target_r=2, total_step=9),
    "LoHa": peft.LoHaConfig(r=2, target_modules=LINEAR),
    "LoKr": peft.LoKrConfig(r=2, target_modules=LINEAR),
    "VeRA": peft.VeraConfig(r=4, target_modules=["query", "key"]),
    "OFT": peft.OFTConfig(oft_block_size=4, target_modules=LINEAR),
    "IA3": peft.IA3Config(
        target_modules=["key", "output.dense"], feedforward_modules=["output.dense"]
    ),
    "FourierFT": peft.FourierFTConfig(n_frequency=20, target_modules=["value"]),
}


def adapt(model, config, *, seed=1):
    """Wrap a model and train its adapter at random."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Overriding a previously|Note that")
        adapted = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and parameter.ndim > 0:
            scale = 0.3 * parameter.detach().abs().mean() + 0.05
            parameter.data += scale * torch.randn_like(parameter)
        assert torch.isfinite(parameter).all(), name
    return adapted


def all_of(base):
    return frozenset(base.layers)


def read(base_folder, folder):
    """Return the pairs by site, having checked that the base was only borrowed."""
    base = load_weights(str(base_folder))
    before = copy.deepcopy(base.model.state_dict())
    modules = [(name, type(module)) for name, module in base.model.named_modules()]
    (checkpoint,) = find_checkpoints(folder)
    pairs = {pair.site: pair for pair in read_pairs(base, checkpoint, all_of(base))}
    assert [(name, type(module)) for name, module in base.model.named_modules()] == modules
    assert all(torch.equal(base.model.state_dict()[key], old) for key, old in before.items())
    return pairs


def merged_by_peft(model, folder):
    """Return the weights of a stock model into which the adapter is loaded and merged."""
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)
    return dict(loaded.merge_and_unload().named_parameters())


def check_pairs(pairs, before, after, prefix=""):
    for site, pair in pairs.items():
        np.testing.assert_array_equal(pair.before, before[f"{site}.weight"].detach().numpy())
        expected = after[f"{prefix}{site}.weight"].detach().numpy()
        np.testing.assert_allclose(pair.after, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_weights_are_those_of_peft(name, bert, base_folder, tmp_path):
    folder = tmp_path / "adapter"
    adapted = adapt(bert, CONFIGS[name])
    adapted.save_pretrained(folder)
    pairs = read(base_folder, folder)
    before = dict(bert.named_parameters())
    after = merged_by_peft(bert, folder)
    moved = {
        key.removesuffix(".weight")
        for key, value in after.items()
        if key.endswith("weight") and not torch.equal(value, before[key])
    }
    assert moved
    assert pairs.keys() == moved
    check_pairs(pairs, before, after)


def test_an_adapter_of_a_classifier_is_read_on_the_bare_encoder(
    bert, base_folder, classify, tmp_path
):
    classifier = classify()
    config = peft.LoraConfig(target_modules=["query", "classifier"], modules_to_save=["pooler"])
    adapt(classifier, config).save_pretrained(tmp_path / "adapter")
    pairs = read(base_folder, tmp_path / "adapter")
    assert list(pairs) == [f"encoder.layer.{i}.attention.self.query" for i in range(4)]
    after = merged_by_peft(classifier, tmp_path / "adapter")
    check_pairs(pairs, dict(bert.named_parameters()), after, prefix="bert.")


def test_the_head_beside_an_adapter_never_replaces_the_bases_own(bert, classify, tmp_path):
    classifier = classify()
    classifier.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS")
    adapted = adapt(classifier, config)
    adapted.save_pretrained(tmp_path / "adapter")
    assert len(read(tmp_path / "base", tmp_path / "adapter")) == 4


def test_an_adapter_of_a_module_around_the_encoder_is_read(bert, base_folder, tmp_path):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = copy.deepcopy(bert)
            self.head = nn.Linear(16, 3)

        def forward(self, x):
            return x

    sites = r"encoder\.encoder\.layer\..*(query|dense)"
    config = peft.LoraConfig(target_modules=sites, use_dora=True)
    adapt(Wrapper(), config).save_pretrained(tmp_path / "adapter")
    pairs = read(base_folder, tmp_path / "adapter")
    assert len(pairs) == 4 * 4
    torch.manual_seed(0)
    after = merged_by_peft(Wrapper(), tmp_path / "adapter")
    check_pairs(pairs, dict(bert.named_parameters()), after, prefix="encoder.")


def test_an_exported_hybrid_has_dead_sites_and_magnitudes_that_are_off(bert, base_folder, tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=LINEAR, use_dora=True)
    model = peft.get_peft_model(copy.deepcopy(bert), config)
    model.requires_grad_(True)
    budget = BudgetSpec(
        params=600, magnitude="budgeted", score="random", policy="threshold", every=1, warmup=0,
        start=2, schedule="linear", hysteresis=0, cooldown=0, recycle=0,
    )  # fmt: skip
    flow = RankFlow(model, budget, 8)
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if "lora_" in n], lr=0.05)
    tokens = torch.randint(1, 13, (4, 6))
    for _ in range(8):
        model(input_ids=tokens).last_hidden_state[..., 0].sum().backward()
        flow.observe()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        flow.step(optimizer)
    states = {(site.rank > 0, site.magnitude is not None) for site in find_sites(model)}
    assert len(states) == 4  # dead or not, with a magnitude or without
    export_adapter(model, tmp_path / "adapter")
    pairs = read(base_folder, tmp_path / "adapter")
    check_pairs(pairs, dict(bert.named_parameters()), merged_by_peft(bert, tmp_path / "adapter"))
    live = [site.name for site in find_sites(model) if site.rank > 0 or site.magnitude is not None]
    assert pairs.keys() >= set(live)


def test_a_fine_tuned_model_is_compared_where_the_base_has_weights(
    bert, base_folder, classify, change_rows, tmp_path
):
    tuned = change_rows(classify(), {"bert.encoder.layer.1.attention.self.value": (0.3, 2.0)})
    tuned.save_pretrained(tmp_path / "tuned")
    pairs = read(base_folder, tmp_path / "tuned")
    assert pairs.keys() == {
        name
        for name, module in bert.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    }
    after = {key: value.detach() for key, value in tuned.bert.state_dict().items()}
    for site, pair in pairs.items():
        weight = after[f"{site}.weight"]
        expected = weight.T if "embeddings" in site else weight
        np.testing.assert_array_equal(pair.after, expected.numpy())


def test_a_classifier_is_compared_with_a_language_model_of_another_head(
    classify, change_rows, tmp_path
):
    classifier = classify()
    language = transformers.BertForMaskedLM(classifier.config)
    language.save_pretrained(tmp_path / "base")
    classifier.save_pretrained(tmp_path / "tuned")
    pairs = read(tmp_path / "base", tmp_path / "tuned")
    assert sum("encoder.layer" in site for site in pairs) == 4 * 6
    assert all(site.startswith("bert.") for site in pairs)


def test_transposed_layers_have_output_neurons_as_rows(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=13, n_embd=16, n_layer=1, n_head=2, n_positions=16,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True)
    adapt(model, lora).save_pretrained(tmp_path / "adapter")
    (pair,) = read(tmp_path / "base", tmp_path / "adapter").values()
    assert pair.before.shape == (48, 16)
    after = merged_by_peft(model, tmp_path / "adapter")
    np.testing.assert_allclose(
        pair.after, after[f"{pair.site}.weight"].detach().T.numpy(), rtol=1e-5, atol=1e-6
    )


def test_a_base_in_low_precision_is_merged_in_float32(bert, tmp_path):
    bert.bfloat16().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["query"])
    adapt(bert, config).save_pretrained(tmp_path / "adapter")
    pairs = read(tmp_path / "base", tmp_path / "adapter")
    bert.float()
    check_pairs(pairs, dict(bert.named_parameters()), merged_by_peft(bert, tmp_path / "adapter"))


def test_weights_that_the_files_lack_are_no_sites(bert, tmp_path):
    state = {key: value for key, value in bert.state_dict().items() if "pooler" not in key}
    bert.save_pretrained(tmp_path / "base", state_dict=state)
    bert.save_pretrained(tmp_path / "tuned")
    assert "pooler.dense" not in load_weights(str(tmp_path / "base")).layers
    assert len(read(tmp_path / "base", tmp_path / "tuned")) == 4 * 6 + 3


def test_input_and_output_embeddings_are_told_apart_from_layers(llama, tmp_path):
    llama().save_pretrained(tmp_path)
    base = load_weights(str(tmp_path))
    assert base.embeddings == {"model.embed_tokens", "lm_head"}
    assert base.layers.keys() - base.embeddings == {
        name for name, module in base.model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }  # fmt: skip


REFUSED = {
    "other layers": (
        lambda w: w.adapter(w.deeper(), peft.LoraConfig(target_modules=["query"])),
        r"does not fit the base model: it has encoder.layer.4.*BertModel has not",
    ),
    "other widths": (
        lambda w: w.adapter(w.wider(), peft.LoraConfig(target_modules=["query"])),
        r"does not fit the base model.*has the shape \(8, 32\), and \(8, 16\) fits.*fine-tuned",
    ),
    "a model of other widths": (
        lambda w: w.wider().save_pretrained(w.folder),
        r"is \(\d+, 13\) there|is \(32, 32\) there and \(16, 16\) in the base|\(32, 13\)",
    ),
    "a model of another kind": (
        lambda w: w.llama().save_pretrained(w.folder),
        "it is a llama and the base is a bert",
    ),
    "an adapter of another kind of model": (
        lambda w: w.adapter(w.llama(), peft.LoraConfig(target_modules=["q_proj"])),
        "it has model.layers.0.self_attn.q_proj, and BertModel has not",
    ),
    "a prompt": (
        lambda w: w.adapter(
            w.llama(), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
        ),
        "is of type PROMPT_TUNING, which leaves the model's weights as they are",
    ),
    "a start from the base's own directions": (
        lambda w: w.adapter(
            w.bert, peft.LoraConfig(target_modules=["query"], init_lora_weights="pissa")
        ),
        "started by 'pissa'.*path_initial_model_for_weight_conversion",
    ),
    "a divergence": (
        lambda w: w.diverged_adapter(),
        r"not finite in .*encoder.layer.0.attention.self.query.lora_B.weight.*diverged",
    ),
    "a model that diverged": (
        lambda w: w.diverged_model(),
        "encoder.layer.0.attention.self.query is not finite",
    ),
    "a damaged file": (
        lambda w: w.damaged(),
        "is damaged.*save or copy it again",
    ),
    "a damaged configuration": (
        lambda w: w.damaged("adapter_config.json"),
        "is not valid JSON.*save or copy it again",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_with_a_remedy(case, bert, base_folder, llama, tmp_path):
    folder = tmp_path / "tuned"
    query = "encoder.layer.0.attention.self.query"

    def bert_like(**changes):
        return transformers.BertModel(transformers.BertConfig(**bert.config.to_dict() | changes))

    def save(model, config):
        adapt(model, config).save_pretrained(folder)

    def diverged_adapter():
        model = adapt(bert, peft.LoraConfig(target_modules=["query"]))
        model.get_submodule(f"base_model.model.{query}").lora_B["default"].weight.data[0] = np.nan
        model.save_pretrained(folder)

    def diverged_model():
        tuned = copy.deepcopy(bert)
        tuned.get_submodule(query).weight.data[0, 0] = np.inf
        tuned.save_pretrained(folder)

    def damaged(file="adapter_model.safetensors"):
        save(bert, peft.LoraConfig(target_modules=["query"]))
        (folder / file).write_bytes(b"nothing of use")

    make, message = REFUSED[case]
    make(
        SimpleNamespace(
            folder=folder,
            bert=bert,
            llama=llama,
            adapter=save,
            deeper=lambda: bert_like(num_hidden_layers=6),
            wider=lambda: bert_like(hidden_size=32),
            diverged_adapter=diverged_adapter,
            diverged_model=diverged_model,
            damaged=damaged,
        )
    )
    with pytest.raises(RankFlowError, match=f"(?s){message}"):
        read(base_folder, folder)


def test_the_base_is_whole_again_after_an_adapter_that_does_not_fit(bert, base_folder, tmp_path):
    base = load_weights(str(base_folder))
    wider = transformers.BertModel(
        transformers.BertConfig(**bert.config.to_dict() | {"hidden_size": 32})
    )
    adapt(wider, peft.LoraConfig(target_modules=["query"])).save_pretrained(tmp_path / "wide")
    adapt(bert, peft.LoraConfig(target_modules=["query"])).save_pretrained(tmp_path / "fits")
    with pytest.raises(RankFlowError, match="does not fit"):
        list(read_pairs(base, *find_checkpoints(tmp_path / "wide"), all_of(base)))
    assert len(list(read_pairs(base, *find_checkpoints(tmp_path / "fits"), all_of(base)))) == 4


def test_a_quantised_base_is_refused(bert, base_folder):
    config = base_folder / "config.json"
    text = config.read_text().replace(
        "{", '{"quantization_config": {"load_in_4bit": true, "quant_method": "bitsandbytes"},', 1
    )
    config.write_text(text)
    with pytest.raises(RankFlowError, match=r"is quantised.*from which it was quantised"):
        load_weights(str(base_folder))


@pytest.mark.parametrize("source", ["/nowhere/at/all", "no-such-model"])
def test_a_base_that_is_not_there_is_refused(source):
    with pytest.raises(RankFlowError, match=r"(?s)cannot be read as a model.*a folder that"):
        load_weights(source)
