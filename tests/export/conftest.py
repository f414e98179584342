"""Tiny adapted models with mixed ranks, dead sites among them, and their base models on disk."""

import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models

from rankflow.engine import RankFlow
from rankflow.specs.budget import BudgetSpec

SHAPE = {
    "vocab_size": 13,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
RANKS = (3, 0, 1, 2, 0, 4)


def _llama(**config):
    config = {"num_key_value_heads": 1, "pad_token_id": 0} | SHAPE | config
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))


def _bert(**config):
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(num_labels=3, **SHAPE | config)
    )


BASES = {"llama": (_llama, "CAUSAL_LM"), "bert": (_bert, "SEQ_CLS")}


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other cost these tiny tensors twenty times their arithmetic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def word_tokenizer():
    words = {f"w{i}": i for i in range(12)} | {"[UNK]": 12}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")), unk_token="[UNK]"
    )
    tokenizer.chat_template = "{{ messages[0].content }}"
    return tokenizer


@pytest.fixture
def base_folder(tmp_path_factory):
    """Write the base model of a name and return its folder."""

    def write(name, **config):
        folder = tmp_path_factory.mktemp("base")
        torch.manual_seed(0)
        BASES[name][0](**config).save_pretrained(folder)
        return folder

    return write


@pytest.fixture
def make_adapted(base_folder):
    """Adapt a model at ranks 0 to 4, with random factors, magnitudes and heads."""

    def make(name="llama", *, ranks=RANKS, base=None, **config):
        folder = base_folder(name, **(base or {}))
        kind, task = type(BASES[name][0]()), BASES[name][1]
        config = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | config
        model = peft.get_peft_model(
            kind.from_pretrained(folder), peft.LoraConfig(task_type=task, **config)
        )
        root = model.get_base_model()
        sites = [n for n, m in root.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
        pattern = {site: ranks[i % len(ranks)] for i, site in enumerate(sites)}
        RankFlow(model, BudgetSpec(rank=8, policy="frozen", ranks=pattern), total_steps=10)
        torch.manual_seed(1)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_magnitude_vector" in key:
                    parameter.mul_(0.7 + 0.6 * torch.rand_like(parameter))
                elif ".lora_" in key or "modules_to_save" in key:
                    parameter.copy_(0.3 * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture
def tokens():
    return torch.randint(1, 13, (3, 7), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def logits_of(tokens):
    """Logits of a model in evaluation mode, whatever mode it is in."""

    @torch.no_grad()
    def logits(model):
        was = model.training
        model.eval()
        found = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        model.train(was)
        return found

    return logits


@pytest.fixture
def stock_base():
    """Load the base model of an adapted one from its folder, untouched."""

    def load(model):
        base = model.get_base_model()
        return type(base).from_pretrained(base.config.name_or_path).eval()

    return load


@pytest.fixture
def snapshot():
    """Everything about a live model that an export might change."""

    def take(model):
        return {
            "state": {key: tensor.clone() for key, tensor in model.state_dict().items()},
            "pointers": {key: p.data_ptr() for key, p in model.named_parameters()},
            "training": {key: module.training for key, module in model.named_modules()},
            "trainable": {key: p.requires_grad for key, p in model.named_parameters()},
            "active": model.active_adapters,
            "random": torch.random.get_rng_state(),
        }

    return take


@pytest.fixture
def assert_same():
    """Compare two snapshots bit by bit."""

    def check(before, after):
        assert before["state"].keys() == after["state"].keys()
        for key, tensor in before["state"].items():
            assert torch.equal(tensor, after["state"][key]), key
        assert torch.equal(before["random"], after["random"])
        for part in ("pointers", "training", "trainable", "active"):
            assert before[part] == after[part]

    return check
