import json
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "fine", "poor", "a", "film", "##s"]
SPECIAL = [
    *("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|header|>", "<|/header|>"),
    *("<|turn|>", "<turn>", "</turn>", "[INST]", "[/INST]"),
]
CORPUS = ["The film was good, and so was the play.\n\nWhat is the capital of France? Paris.\n"] * 4
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def caches_in_a_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def write_rows(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def sentiment_rows():
    """Texts whose first word gives the class away."""
    pairs = [("good", "yes"), ("bad", "no"), ("fine", "yes"), ("poor", "no")]
    return [
        {"text": f"{word} a film" + " a" * n, "label": y} for n in range(5) for word, y in pairs
    ]


def make_tokenizer(words=WORDS):
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def save_model(folder: Path, model, tokenizer=None) -> str:
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def bert_folder(tmp_path):
    """A tiny encoder without a task head, as MiniLM is."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **SIZES,
    )
    return save_model(tmp_path / "bert", BertModel(config))


@pytest.fixture
def llama_folder(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        intermediate_size=32,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        **SIZES,
    )
    return save_model(tmp_path / "llama", LlamaForCausalLM(config))


@pytest.fixture
def bart_folder(tmp_path):
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=len(WORDS),
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        decoder_start_token_id=3,
        forced_eos_token_id=None,
    )
    return save_model(tmp_path / "bart", BartForConditionalGeneration(config))


def make_chat_tokenizer(backend, special=(), alphabet=()):
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[*SPECIAL, *special],
        initial_alphabet=list(alphabet),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.add_special_tokens({"extra_special_tokens": SPECIAL[3:]})
    return tokenizer


@pytest.fixture
def byte_level():
    """Byte pairs, as most decoders have them: every text decodes to itself."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return make_chat_tokenizer(backend, alphabet=pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture
def spaces_as_letters():
    """As Llama 2 and Mistral do it: a space begins every text, and bytes stand for rare letters."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return make_chat_tokenizer(backend, special=[f"<0x{byte:02X}>" for byte in range(256)])


@pytest.fixture
def chat_template():
    return (Path(__file__).parent / "chat_templates" / "chatml.jinja").read_text(encoding="utf-8")


@pytest.fixture
def chat_folder(tmp_path, byte_level, chat_template):
    """A tiny decoder whose tokenizer knows how a conversation is written."""
    torch.manual_seed(0)
    byte_level.chat_template = chat_template
    config = LlamaConfig(
        vocab_size=len(byte_level),
        intermediate_size=32,
        max_position_embeddings=128,
        pad_token_id=2,
        bos_token_id=0,
        eos_token_id=1,
        **SIZES,
    )
    return save_model(tmp_path / "chat", LlamaForCausalLM(config), byte_level)
