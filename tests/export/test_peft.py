import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from rankflow import surgery
from rankflow.adapters.sites import find_sites
from rankflow.engine import RankFlow
from rankflow.errors import ExportError, SiteError
from rankflow.export import peft as export_module
from rankflow.export import write as write_module
from rankflow.export.folder import export_folder
from rankflow.export.inspect import FACTS, WEIGHTS
from rankflow.export.peft import export_adapter
from rankflow.specs.budget import BudgetSpec

# Loads every case with stock libraries alone and notes the logits that it then gives.
STOCK_READER = """
import logging, sys, warnings
from pathlib import Path
import peft, torch, transformers

said = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
transformers.utils.logging.add_handler(handler)
torch.set_num_threads(1)
root = Path(sys.argv[1])
for case in sorted(root.iterdir()):
    inputs = torch.load(case / "inputs.pt")
    kind = getattr(transformers, (case / "class").read_text())

    def base():
        return kind.from_pretrained(case / "base").eval()

    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base(), case / "adapter").eval()
        logits = {"PeftModel": model(**inputs).logits}
        logits["merged"] = model.merge_and_unload(safe_merge=True)(**inputs).logits
        hosted = base()
        hosted.load_adapter(str(case / "adapter"))
        logits["load_adapter"] = hosted(**inputs).logits
    # What PEFT and transformers tell each other of the future is not about the adapter.
    told = said + [str(w.message) for w in caught if w.category is UserWarning]
    said.clear()
    torch.save({"logits": logits, "warnings": told}, case / "read.pt")
assert "rankflow" not in sys.modules
"""

SIZES = {"vocab_size": 13, "max_position_embeddings": 16}


def make_llama():
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        **SIZES,
    )
    return transformers.LlamaForCausalLM(config), "CAUSAL_LM"


def make_bert():
    config = transformers.BertConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=3,
        **SIZES,
    )
    return transformers.BertForSequenceClassification(config), "SEQ_CLS"


def make_bart():
    config = transformers.BartConfig(
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        **SIZES,
    )
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 1, 2
    return transformers.BartForConditionalGeneration(config), "SEQ_2_SEQ_LM"


BASES = {"llama": make_llama, "bert": make_bert, "bart": make_bart}
CASES = [(name, use_dora) for name in BASES for use_dora in (False, True)]
IDS = [f"{name}-{'DoRA' if use_dora else 'LoRA'}" for name, use_dora in CASES]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other cost these tiny tensors twenty times their arithmetic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_inputs(name):
    tokens = torch.randint(3, 13, (2, 7), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return inputs | ({"decoder_input_ids": tokens[:, :5]} if name == "bart" else {})


def adapt(base, task, **config):
    config = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": task} | config
    return peft.get_peft_model(base, peft.LoraConfig(**config))


def sites_of(model):
    base = model.get_base_model()
    return [n for n, m in base.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]


def force_ranks(model, ranks):
    """Let the engine resize the sites to the given ranks, in turn, before any step."""
    pattern = {site: ranks[i % len(ranks)] for i, site in enumerate(sites_of(model))}
    return RankFlow(model, BudgetSpec(rank=8, policy="frozen", ranks=pattern), total_steps=10)


def train(model, name, steps=6, flow=None):
    inputs = make_inputs(name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    for _ in range(steps):
        logits = model(**inputs).logits.flatten(0, -2)
        labels = torch.arange(len(logits)) % logits.shape[-1]
        nn.functional.cross_entropy(logits, labels).backward()
        if flow is not None:
            flow.observe()
        optimizer.step()
        optimizer.zero_grad()
        if flow is not None:
            flow.step(optimizer)
    model.eval()
    return optimizer


@torch.no_grad()
def logits_of(model, name="llama"):
    return model(**make_inputs(name)).logits


def make_trained(name="llama", *, ranks=(3, 0, 1, 2, 0, 4), **config):
    torch.manual_seed(0)
    model = adapt(*BASES[name](), **config)
    force_ranks(model, ranks)
    train(model, name)
    return model


def read_back(folder, name="llama", **arguments):
    torch.manual_seed(0)
    return peft.PeftModel.from_pretrained(BASES[name]()[0], folder, **arguments).eval()


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Every case trained and exported, and read by a process that knows no rankflow."""
    root = tmp_path_factory.mktemp("cases")
    for (name, use_dora), case in zip(CASES, IDS, strict=True):
        folder = root / case
        torch.manual_seed(0)
        base, task = BASES[name]()
        base.save_pretrained(folder / "base")
        (folder / "class").write_text(type(base).__name__)
        torch.save(make_inputs(name), folder / "inputs.pt")
        untrained = logits_of(base.eval(), name)
        model = adapt(base, task, use_dora=use_dora)
        flow = force_ranks(model, (3, 0, 1, 2, 0, 4))
        train(model, name)
        export_adapter(model, folder / "adapter")
        live = {"logits": logits_of(model, name), "untrained": untrained, "ranks": flow.ranks}
        torch.save(live, folder / "live.pt")
    script = root.parent / "read.py"
    script.write_text(STOCK_READER)
    done = subprocess.run(
        [sys.executable, str(script), str(root)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize("reader", ["PeftModel", "merged", "load_adapter"])
@pytest.mark.parametrize("case", IDS)
def test_stock_libraries_in_a_new_process_give_the_same_logits(written, case, reader):
    live = torch.load(written / case / "live.pt")
    read = torch.load(written / case / "read.pt")["logits"][reader]
    assert (live["logits"] - live["untrained"]).abs().max() > 0.1
    assert (read - live["logits"]).abs().max() <= 1e-5


@pytest.mark.parametrize("case", IDS)
def test_stock_libraries_load_without_a_warning(written, case):
    assert torch.load(written / case / "read.pt")["warnings"] == []


@pytest.mark.parametrize("case", IDS)
def test_the_configuration_is_a_stock_one_with_every_rank_exact(written, case):
    folder = written / case / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    ranks = torch.load(written / case / "live.pt")["ranks"]
    assert set(ranks.values()) == {0, 1, 2, 3, 4}
    assert config.keys() <= peft.LoraConfig().to_dict().keys()
    assert config["peft_type"] == "LORA"
    assert config["use_rslora"] is False
    alive = {site: rank for site, rank in ranks.items() if rank > 0}
    expected = {site: max(rank, 1) for site, rank in ranks.items()} if "DoRA" in case else alive
    patterns = {"^" + site.replace(".", r"\."): rank for site, rank in expected.items()}
    assert config["rank_pattern"] == patterns
    assert config["alpha_pattern"] == {key: 1.5 * rank for key, rank in patterns.items()}
    assert config["r"] == 4


@pytest.mark.parametrize("case", IDS)
def test_tensors_have_stock_names_and_only_living_sites_take_room(written, case):
    folder = written / case / "adapter"
    tensors = load_file(folder / WEIGHTS)
    assert all(key.startswith("base_model.model.") for key in tensors)
    ranks = torch.load(written / case / "live.pt")["ranks"]
    for site, rank in ranks.items():
        prefix = f"base_model.model.{site}.lora_"
        found = {key.removeprefix(prefix): t for key, t in tensors.items() if prefix in key}
        if "DoRA" in case:
            assert found.keys() == {"A.weight", "B.weight", "magnitude_vector.weight"}
            assert found["A.weight"].shape[0] == found["B.weight"].shape[1] == max(rank, 1)
            assert rank > 0 or not (found["A.weight"].any() or found["B.weight"].any())
        elif rank > 0:
            assert found.keys() == {"A.weight", "B.weight"}
            assert found["A.weight"].shape[0] == found["B.weight"].shape[1] == rank
        else:
            assert found == {}


def test_a_dead_dora_site_keeps_its_trained_magnitude(written):
    folder = written / "llama-DoRA"
    ranks = torch.load(folder / "live.pt")["ranks"]
    dead = next(site for site, rank in ranks.items() if rank == 0)
    weights = load_file(folder / "adapter" / WEIGHTS)
    magnitude = weights[f"base_model.model.{dead}.lora_magnitude_vector.weight"]
    base = load_file(folder / "base" / "model.safetensors")[f"{dead}.weight"]
    assert not torch.allclose(magnitude, base.norm(dim=1), rtol=1e-3)


@pytest.mark.parametrize("case", IDS)
def test_the_own_file_tells_the_true_ranks_and_what_is_stored(written, case):
    folder = written / case
    own = json.loads((folder / "adapter" / FACTS).read_text())
    assert own["ranks"] == torch.load(folder / "live.pt")["ranks"]
    tensors = load_file(folder / "adapter" / WEIGHTS)
    assert own["stored_parameters"] == sum(t.numel() for k, t in tensors.items() if ".lora_" in k)
    assert own["run"] is None


def test_a_trained_head_travels_with_the_adapter(written):
    tensors = load_file(written / "bert-LoRA" / "adapter" / WEIGHTS)
    assert any("classifier" in key for key in tensors)


def test_parameters_adam_state_and_file_shrink_with_the_ranks(tmp_path):
    torch.manual_seed(0)
    model = adapt(*make_llama())
    spec = BudgetSpec(rank=1, start=4, schedule="linear", warmup=2, cooldown=2, every=4, recycle=0)
    flow = RankFlow(model, spec, total_steps=10)
    inputs = make_inputs("llama")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    sizes = []
    for step in range(10):
        if step in (1, 9):
            export_adapter(model, tmp_path / str(step))
            state = [t for entry in optimizer.state.values() for t in entry.values()]
            sizes.append(
                (
                    sum(p.numel() for p in model.parameters() if p.requires_grad),
                    sum(t.nbytes for t in state if t.ndim > 0),
                    (tmp_path / str(step) / WEIGHTS).stat().st_size,
                )
            )
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        flow.observe()
        optimizer.step()
        optimizer.zero_grad()
        flow.step(optimizer)
    (parameters, adam, file), (parameters_after, adam_after, file_after) = sizes
    assert adam == 8 * parameters
    assert parameters_after <= parameters / 4
    assert adam_after == 8 * parameters_after
    # The rest is the header, which names every tensor that is left.
    assert file - file_after >= 4 * (parameters - parameters_after)


def test_an_adapter_that_was_reallocated_while_training_reads_back(tmp_path, use_dora):
    torch.manual_seed(0)
    model = adapt(*make_llama(), use_dora=use_dora)
    spec = BudgetSpec(
        rank=1.5, start=1.5, schedule="cubic", warmup=1, cooldown=1, every=2, recycle=0.3, protect=0
    )
    flow = RankFlow(model, spec, total_steps=12)
    train(model, "llama", 12, flow)
    assert len(set(flow.ranks.values())) > 1
    folder = export_adapter(model, tmp_path / "adapter", facts=flow.facts({"loss": 0.25}))
    assert (logits_of(read_back(folder)) - logits_of(model)).abs().max() <= 1e-5
    own = json.loads((folder / FACTS).read_text())
    assert own["run"]["spent"] == flow.spent
    assert own["run"]["metrics"] == {"loss": 0.25}


def test_a_site_that_died_and_came_back_reads_back(tmp_path, use_dora):
    model = make_trained(use_dora=use_dora)
    model.train()
    force_ranks(model, (2, 3, 0))
    train(model, "llama")
    folder = export_adapter(model, tmp_path / "adapter")
    assert (logits_of(read_back(folder)) - logits_of(model)).abs().max() <= 1e-5


@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_adapter_that_rankflow_never_steered_reads_back(tmp_path, use_dora, use_rslora):
    torch.manual_seed(0)
    model = adapt(
        *make_llama(), use_dora=use_dora, use_rslora=use_rslora, rank_pattern={"q_proj": 2}
    )
    train(model, "llama")
    folder = export_adapter(model, tmp_path / "adapter")
    assert (logits_of(read_back(folder)) - logits_of(model)).abs().max() <= 1e-5


def test_a_model_trains_on_after_it_was_exported(tmp_path):
    model = make_trained()
    before = logits_of(model)
    export_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits_of(model), before)
    train(model, "llama", 2)
    assert not torch.equal(logits_of(model), before)


def test_an_adapter_of_another_name_is_written_as_a_folder_of_its_own(tmp_path):
    torch.manual_seed(0)
    base, task = make_llama()
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type=task)
    model = peft.get_peft_model(base, config, adapter_name="steered")
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    spec = BudgetSpec(rank=2, policy="random", seed=3)
    RankFlow(model, spec, total_steps=10, adapter_name="steered")
    train(model, "llama")
    folder = export_adapter(model, tmp_path / "adapter", adapter_name="steered")
    assert names(folder) == [
        "README.md",
        "SHA256SUMS",
        "adapter_config.json",
        "adapter_model.safetensors",
        "export_report.json",
        "rankflow.json",
    ]
    assert not any("other" in key or "steered" in key for key in load_file(folder / WEIGHTS))
    assert (logits_of(read_back(folder)) - logits_of(model)).abs().max() <= 1e-5


def test_bf16_adapters_keep_their_bits(tmp_path):
    model = make_trained()
    for key, parameter in model.named_parameters():
        if ".lora_" in key:
            parameter.data = parameter.data.to(torch.bfloat16)
    live = {k: p for k, p in model.named_parameters() if ".lora_" in k and p.numel()}
    tensors = load_file(export_adapter(model, tmp_path / "adapter") / WEIGHTS)
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert len(tensors) == len(live)
    assert all(torch.equal(tensors[k.replace(".default", "")], p) for k, p in live.items())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_adapters_on_both_ends_of_tied_embeddings_read_back(tmp_path, use_dora):
    """PEFT then saves the base weights of both ends, which are one tensor in memory."""

    def tied():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                **make_llama()[0].config.to_dict() | {"tie_word_embeddings": True}
            )
        )

    model = adapt(
        tied(), "CAUSAL_LM", target_modules=["embed_tokens", "lm_head"], use_dora=use_dora
    )
    live = model.get_base_model()
    assert live.lm_head.base_layer.weight is live.model.embed_tokens.base_layer.weight
    force_ranks(model, (3, 1))
    train(model, "llama")
    loaded = peft.PeftModel.from_pretrained(tied(), export_adapter(model, tmp_path / "out")).eval()
    assert (logits_of(loaded) - logits_of(model)).abs().max() <= 1e-5


def test_an_adapter_without_any_component_is_refused(tmp_path):
    model = adapt(*make_llama())
    sites = find_sites(model, "default")
    surgery.replace(sites, [{"A": site.A[:0], "B": site.B[:, :0]} for site in sites])
    with pytest.raises(ExportError, match=r"all 14 sites of adapter 'default' have rank 0"):
        export_adapter(model, tmp_path / "adapter")
    assert names(tmp_path) == []


def test_a_dora_adapter_of_magnitudes_alone_reads_back(tmp_path):
    model = make_trained(ranks=(0,), use_dora=True)
    folder = export_adapter(model, tmp_path / "adapter")
    assert (logits_of(read_back(folder)) - logits_of(model)).abs().max() <= 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    model = make_trained()
    model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"].weight.data[0] = value
    with pytest.raises(ExportError, match=r"1 tensors are not finite.*q_proj\.lora_A"):
        export_adapter(model, tmp_path / "adapter")
    assert names(tmp_path) == []


def test_an_unknown_adapter_is_refused(tmp_path):
    with pytest.raises(SiteError, match="no adapter 'other'"):
        export_adapter(make_trained(), tmp_path / "adapter", adapter_name="other")


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ExportError, match="holds no adapter, so it is not replaced"):
        export_adapter(make_trained(), tmp_path)
    assert names(tmp_path) == ["thesis.tex"]


def test_a_file_is_not_replaced(tmp_path):
    path = tmp_path / "adapter"
    path.write_text("years of work")
    with pytest.raises(ExportError, match="is a file, and an adapter is a folder"):
        export_adapter(make_trained(), path)
    assert path.read_text() == "years of work"


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "adapter").mkdir()
    folder = export_adapter(make_trained(), tmp_path / "adapter")
    assert WEIGHTS in names(folder)


def test_an_older_export_is_replaced_as_a_whole(tmp_path):
    folder = export_adapter(make_trained(use_dora=True), tmp_path / "adapter")
    (folder / "leftover").touch()
    model = make_trained(ranks=(2, 0))
    export_adapter(model, folder)
    assert "leftover" not in names(folder)
    assert names(tmp_path) == ["adapter"]
    assert (logits_of(read_back(folder)) - logits_of(model)).abs().max() <= 1e-5


def _fail(*arguments, **keywords):
    raise OSError("disk full")


@pytest.mark.parametrize(
    ("module", "moment"),
    [
        (export_module, "_save_stock"),
        (write_module, "save_file"),
        (write_module, "load_file"),
        (write_module, "write_card"),
    ],
)
def test_a_failure_in_the_middle_leaves_the_older_export_whole(
    tmp_path, monkeypatch, module, moment
):
    model = make_trained()
    folder = export_adapter(model, tmp_path / "adapter")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    train(model, "llama")
    monkeypatch.setattr(module, moment, _fail)
    with pytest.raises(OSError, match="disk full"):
        export_adapter(model, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert names(tmp_path) == ["adapter"]


def test_a_file_that_reads_back_otherwise_is_noticed(tmp_path, monkeypatch):
    def save_wrongly(tensors, path, metadata):
        first = next(iter(tensors))
        save_file(tensors | {first: tensors[first] + 1}, path, metadata)

    monkeypatch.setattr(write_module, "save_file", save_wrongly)
    with pytest.raises(ExportError, match="what was written differs from the model in"):
        export_adapter(make_trained(), tmp_path / "adapter")
    assert names(tmp_path) == []


def test_the_folder_is_given_as_text_or_path_and_its_parents_are_made(tmp_path):
    folder = export_adapter(make_trained(), str(tmp_path / "a" / "b"))
    assert folder == Path(tmp_path / "a" / "b")
    assert WEIGHTS in names(folder)


def test_export_emits_no_warning(tmp_path, use_dora):
    model = make_trained(use_dora=use_dora)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_adapter(model, tmp_path / "adapter")


def make_budgeted(**changes):
    """Train under a budget that covers magnitudes, and end with some on and some off."""
    torch.manual_seed(0)
    model = adapt(*make_llama(), use_dora=True)
    keys = {"warmup": 1, "cooldown": 1, "every": 2, "recycle": 0.6, "hysteresis": 0, "protect": 0}
    keys |= {"rank": 0.8, "magnitude": "budgeted", "score": "random", "policy": "threshold"}
    flow = RankFlow(model, BudgetSpec(**keys | changes), total_steps=12)
    train(model, "llama", 12, flow)
    return model, flow


@pytest.mark.parametrize("magnitude", ["never", "budgeted"])
def test_an_adapter_of_magnitudes_that_come_and_go_reads_back_in_peft_and_transformers(
    tmp_path, magnitude
):
    model, flow = make_budgeted(magnitude=magnitude)
    folder = export_adapter(model, tmp_path / "adapter", facts=flow.facts())
    live = logits_of(model)
    torch.manual_seed(0)
    untouched, _ = make_llama()
    assert (logits_of(untouched.eval()) - live).abs().max() > 0.1
    assert (logits_of(read_back(folder)) - live).abs().max() <= 1e-5
    untouched.load_adapter(str(folder))
    assert (logits_of(untouched) - live).abs().max() <= 1e-5
    merged = read_back(folder).merge_and_unload(safe_merge=True)
    assert (logits_of(merged) - live).abs().max() <= 1e-5
    if magnitude == "budgeted":
        assert {True, False} == set(flow.history[-1].magnitudes.values())
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["use_dora"] is (magnitude == "budgeted")
    title = (folder / "README.md").read_text().split("# ")[1]
    assert title.startswith("DoRA" if magnitude == "budgeted" else "LoRA")


def test_trained_and_stored_parameters_travel_through_another_export(tmp_path):
    model, flow = make_budgeted()
    folder = export_adapter(model, tmp_path / "adapter", facts=flow.facts())
    again = export_folder(folder, tmp_path / "again")
    facts = [json.loads((path / FACTS).read_text()) for path in (folder, again)]
    stored = sum(t.numel() for k, t in load_file(folder / WEIGHTS).items() if ".lora_" in k)
    for own in facts:
        assert own["trained_parameters"] == flow.spent < own["stored_parameters"] == stored
    for path in (folder, again):
        assert (
            f"{stored:,} parameters and {flow.spent:,} are trained"
            in (path / "README.md").read_text()
        )


def test_where_nobody_knows_what_was_trained_nothing_is_claimed(tmp_path):
    model = make_trained()
    folder = export_adapter(model, tmp_path / "adapter")
    (folder / FACTS).unlink()
    again = export_folder(folder, tmp_path / "again")
    own = json.loads((again / FACTS).read_text())
    assert own["trained_parameters"] is None
    assert own["stored_parameters"] == sum(t.numel() for t in load_file(again / WEIGHTS).values())
    assert "The file holds" not in (again / "README.md").read_text()


def test_the_card_loads_the_adapter_by_peft_alone(tmp_path):
    folder = export_adapter(make_trained(), tmp_path / "adapter")
    card = (folder / "README.md").read_text()
    snippet = card.split("```python\n")[1].split("```")[0]
    scope = {"base": BASES["llama"]()[0]}
    exec(snippet.replace("path/to/this/folder", str(folder)), scope)
    assert isinstance(scope["model"], peft.PeftModel)
    assert "rankflow" not in snippet
