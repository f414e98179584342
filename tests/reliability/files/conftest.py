"""A small adapter, an engine's checkpoint and a base model, to be damaged; and who reads them."""

import json
import os
import shutil
import struct

import peft
import pytest
import torch
import transformers

from rankflow.analysis.checkpoints import find_checkpoints
from rankflow.analysis.weights import load_weights, read_pairs
from rankflow.checkpoint import save_state
from rankflow.engine import RankFlow
from rankflow.export.compress_folder import BaseReader, compress_folder
from rankflow.export.folder import export_folder
from rankflow.export.inspect import inspect_adapter
from rankflow.export.loading import load_adapted
from rankflow.specs.budget import BudgetSpec

SHAPE = {
    "vocab_size": 13,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
}


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """Write whole ones: ``base``, ``adapter`` (LoRA) and ``checkpoint``."""
    root = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    model.save_pretrained(root / "base")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]
    )
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    adapted.peft_config["default"].base_model_name_or_path = str(root / "base")
    adapted.save_pretrained(root / "adapter")
    flow = RankFlow(adapted, BudgetSpec(rank=1), total_steps=10)
    (root / "checkpoint").mkdir()
    save_state(flow.state_dict(), root / "checkpoint")
    return root


@pytest.fixture
def copies(originals, tmp_path):
    """Copy them to where they may be damaged, and tell the adapter where its base is now."""
    for name in ("base", "adapter", "checkpoint"):
        shutil.copytree(originals / name, tmp_path / name)
    path = tmp_path / "adapter" / "adapter_config.json"
    values = json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}
    path.write_text(json.dumps(values))
    return tmp_path


class Payload:
    """What a pickle may hold: it makes a file when it is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """Return a path that any executed code makes; a module ``planted`` does so when imported."""
    mark = tmp_path / "executed"
    planted = tmp_path / "importable"
    planted.mkdir()
    (planted / "planted.py").write_text(f"import os; os.mkdir({str(mark)!r})")
    monkeypatch.syspath_prepend(str(planted))
    yield mark
    assert not mark.exists(), "code of a file was executed"


@pytest.fixture
def payload(mark):
    return Payload(mark)


def split(content):
    """Return the header of a safetensors file and the bytes of its tensors."""
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture
def edit_header():
    """Rewrite a file with another header; its tensors' bytes stay."""

    def edit(path, change):
        header, data = split(path.read_bytes())
        path.write_bytes(join(change(header) or header, data))

    return edit


def _analyze(folder, base):
    weights = load_weights(str(base))
    layers = frozenset(weights.layers)
    return [p for c in find_checkpoints(folder) for p in read_pairs(weights, c, layers)]


def _compress(folder, base):
    reader = BaseReader(rows=lambda names: {})
    return compress_folder(folder, folder.parent / "small", 60, base=reader)


READERS = {
    "inspect": lambda folder, base: inspect_adapter(folder),
    "export": lambda folder, base: export_folder(folder, folder.parent / "out"),
    "export merged": lambda folder, base: export_folder(
        folder, folder.parent / "merged", format="merged", base_model=str(base)
    ),
    "compress": _compress,
    "analyze": _analyze,
    "load": lambda folder, base: load_adapted(folder, str(base)),
}


@pytest.fixture
def readers():
    """Everything that a user may do with an adapter's folder, by name."""
    return READERS
