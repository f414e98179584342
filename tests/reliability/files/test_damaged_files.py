"""Each kind of damaged or hostile file by itself: refused with a reason, and nothing executed."""

import json
import os
import pickle
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, TrainingArguments

from rankflow.checkpoint import STATE_FILE, load_state
from rankflow.containment import contained
from rankflow.errors import CheckpointError, FileError, RankFlowError
from rankflow.export.tokenizer import find_tokenizer
from rankflow.integrations.huggingface import RankFlowTrainer
from rankflow.model_files import check_model
from rankflow.report.events import EVENTS_FILE, read_run
from rankflow.specs.budget import BudgetSpec
from rankflow.strict_json import parse_json
from rankflow.tensor_files import check_finite, read_header
from rankflow.training.chat import Conversation

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def first(header):
    """The entry of the tensor that comes first, for adapters and states alike."""
    return min(
        (v for k, v in header.items() if k != "__metadata__"), key=lambda v: v["data_offsets"]
    )


def last(header):
    return max(
        (v for k, v in header.items() if k != "__metadata__"), key=lambda v: v["data_offsets"]
    )


def set_first(**values):
    return lambda header: first(header).update(values)


def twice(header):
    """The header with its last tensor there twice."""
    text = json.dumps(header)
    name = max((k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"])
    return f"{text[:-1]}, {json.dumps(name)}: {json.dumps(header[name])}}}".encode()


def shift_last(by):
    def shift(header):
        last(header)["data_offsets"] = [offset + by for offset in last(header)["data_offsets"]]

    return shift


def stretch_last(header):
    start, stop = last(header)["data_offsets"]
    last(header).update(data_offsets=[start, stop - 4], shape=[(stop - start) // 4 - 1])


# What is wrong with a header, how to make it so, and what the message must say.
HEADERS = {
    "a tensor that is there twice": (twice, "is there twice"),
    "metadata that is there twice": (
        lambda h: (
            b'{"__metadata__": {}, ' + json.dumps(h).replace("{", "", 1).encode()
            if "__metadata__" in h
            else twice(h)
        ),
        "is there twice",
    ),
    "an unknown type": (set_first(dtype="F33"), "unknown type 'F33'"),
    "a type of another width": (set_first(dtype="F64"), "has .* bytes"),
    "a negative shape": (set_first(shape=[-1, 2]), "has the shape"),
    "a shape of fractions": (set_first(shape=[2.0, 2]), "has the shape"),
    "a shape of booleans": (set_first(shape=[True]), "has the shape"),
    "a shape whose product overflows": (set_first(shape=[2**62, 2**62, 4]), "has .* bytes"),
    "a huge shape": (set_first(shape=[10**12]), "has .* bytes"),
    "overflowing offsets": (set_first(data_offsets=[0, 2**64]), "has the offsets"),
    "offsets in reverse": (set_first(data_offsets=[8, 0]), "has the offsets"),
    "three offsets": (set_first(data_offsets=[0, 8, 8]), "has the offsets"),
    "overlapping tensors": (shift_last(-4), "overlaps"),
    "a hole between tensors": (shift_last(4), "leaves a hole"),
    "bytes of no tensor": (stretch_last, "its tensors end at byte"),
    "an entry without a type": (lambda h: first(h).pop("dtype") and None, "not dtype, shape"),
    "an entry with more": (set_first(code="import os"), "not dtype, shape"),
    "an entry that is a list": (lambda h: h.update(x=[1]), "not dtype, shape"),
    "metadata that is no text": (lambda h: h.update(__metadata__={"a": 1}), "metadata is not"),
    "a name with a null byte": (lambda h: h.update({"a\0b": first(h)}), "not the name of a tensor"),
    "no JSON": (lambda h: b"{" * 20, "damaged"),
    "no UTF-8": (lambda h: b'{"\xff": 1}', "damaged"),
    "a list": (lambda h: b"[]", "instead of an object"),
    "deep JSON": (lambda h: b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested more than"),
    "a number of a million digits": (lambda h: b'{"a": ' + b"9" * 10**6 + b"}", "damaged"),
    "a NaN": (lambda h: b'{"a": NaN}', "NaN is no number"),
}


@pytest.mark.fault("damaged checkpoint or adapter")
@pytest.mark.parametrize("case", HEADERS)
def test_a_damaged_header_is_refused_by_whatever_reads_an_adapter(
    case, copies, readers, edit_header, mark
):
    change, message = HEADERS[case]
    edit_header(copies / "adapter" / "adapter_model.safetensors", change)
    for read in readers.values():
        with pytest.raises(FileError, match=message):
            read(copies / "adapter", copies / "base")


@pytest.mark.fault("damaged checkpoint or adapter")
@pytest.mark.parametrize("case", HEADERS)
def test_a_damaged_header_of_a_checkpoint_is_refused(case, copies, edit_header):
    change, _ = HEADERS[case]
    edit_header(copies / "checkpoint" / STATE_FILE, change)
    with pytest.raises(CheckpointError, match=r"is damaged .*resume from an older checkpoint"):
        load_state(copies / "checkpoint")


def write_pickle(path, payload):
    torch.save({"weight": payload}, path)


def write_plain_pickle(path, payload):
    path.write_bytes(pickle.dumps(payload))


def write_length(length):
    return lambda path, _: path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])


def cut(path, _):
    path.write_bytes(path.read_bytes()[:-5])


FILES = {
    "a pickle under this name": (write_pickle, "is a pickle of PyTorch"),
    "a plain pickle under this name": (write_plain_pickle, "is a pickle of PyTorch"),
    "a header of 2^60 bytes": (write_length(2**60), "header is to have 1,152,921"),
    "a header of 2^64 - 1 bytes": (write_length(2**64 - 1), "header is to have 18,446"),
    "a header as long as the file": (
        lambda path, _: write_length(path.stat().st_size)(path, None),
        "there are .* in the file",
    ),
    "a file cut short": (cut, "its tensors end at byte"),
    "a file with more behind": (
        lambda path, _: path.write_bytes(path.read_bytes() + b"\0" * 8),
        "its tensors end at byte",
    ),
    "an empty file": (lambda path, _: path.write_bytes(b""), "it has 0 bytes"),
    "a folder": (lambda path, _: (path.unlink(), path.mkdir()), "not a regular file"),
    "a pipe": (lambda path, _: (path.unlink(), os.mkfifo(path)), "not a regular file"),
    "a link out of the folder": (
        lambda path, _: (path.rename(path.parent.parent / "x"), path.symlink_to("../x")),
        "leads out of the folder",
    ),
    "a link to itself": (lambda path, _: (path.unlink(), path.symlink_to(path)), "."),
}


@pytest.mark.fault("damaged checkpoint or adapter")
@pytest.mark.parametrize("case", FILES)
def test_a_damaged_file_of_tensors_is_refused_by_whatever_reads_an_adapter(
    case, copies, readers, payload
):
    damage, message = FILES[case]
    damage(copies / "adapter" / "adapter_model.safetensors", payload)
    for read in readers.values():
        with pytest.raises(RankFlowError, match=f"{message}|holds no (adapter|weights)"):
            read(copies / "adapter", copies / "base")


@pytest.mark.fault("damaged checkpoint or adapter")
@pytest.mark.parametrize("case", FILES)
def test_a_damaged_state_of_a_checkpoint_is_refused(case, copies, payload):
    FILES[case][0](copies / "checkpoint" / STATE_FILE, payload)
    with pytest.raises(CheckpointError, match="resume from"):
        load_state(copies / "checkpoint")


@pytest.mark.fault("damaged checkpoint or adapter")
@pytest.mark.parametrize("name", ["inspect", "export", "compress", "analyze", "load"])
def test_a_pickle_beside_the_configuration_is_never_loaded(name, copies, readers, payload):
    (copies / "adapter" / "adapter_model.safetensors").unlink()
    write_pickle(copies / "adapter" / "adapter_model.bin", payload)
    with pytest.raises(RankFlowError, match=r"is a pickle, which may run code|holds no adapter"):
        readers[name](copies / "adapter", copies / "base")


@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "bfloat16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_found_in_every_type(kind, value, tmp_path):
    from safetensors.torch import save_file as save

    tensor = torch.zeros(3, 5, dtype=getattr(torch, kind))
    save({"good": tensor, "high": tensor + torch.finfo(tensor.dtype).max}, tmp_path / "good")
    check_finite(read_header(tmp_path / "good"))
    tensor[2, 4] = value
    save({"bad": tensor}, tmp_path / "bad")
    with pytest.raises(FileError, match="a number that is not finite in 'bad'"):
        check_finite(read_header(tmp_path / "bad"))


@pytest.mark.fault("damaged checkpoint or adapter")
@pytest.mark.parametrize("name", ["export", "export merged", "compress", "analyze", "load"])
def test_an_adapter_that_is_not_finite_is_refused_where_its_tensors_are_read(name, copies, readers):
    path = copies / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[KEY][1, 3] = np.nan
    save_file(tensors, path)
    with pytest.raises(FileError, match=rf"not finite in '{KEY}'"):
        readers[name](copies / "adapter", copies / "base")


def reshape(shape, key=KEY):
    return lambda tensors: tensors.update({key: np.ones(shape, np.float32)})


SHAPES = {
    "a factor of another rank": (reshape((3, 8)), r"\(3, 8\) and .*\(8, 2\)"),
    "a factor of another width": (
        reshape((2, 9)),
        r"lora_A.weight has .* \(2, 9\).*\(2, 8\)",
    ),
    "a factor of more axes": (reshape((2, 2, 4)), r"lora_A.weight has the shape \(2, 2, 4\)"),
    "a vector": (reshape((2,)), r"lora_A.weight of type F32 and shape \(2,\)"),
    "whole numbers": (
        lambda t: t.update({KEY: np.ones((2, 8), np.int64)}),
        "lora_A.weight of type I64",
    ),
    "a site of another rank than announced": (
        lambda t: t.update(
            {k: np.ones((1, 8) if "_A" in k else (8, 1), np.float32) for k in (KEY, B)}
        ),
        r"factors of rank 1 .*rank 2 in its adapter_config",
    ),
    "a factor too few": (lambda t: t.pop(KEY), "stands without its other factor"),
    "a site too few": (lambda t: (t.pop(KEY), t.pop(B)), "takes in .*q_proj'"),
    "a site that the base lacks": (
        lambda t: t.update({k.replace("q_proj", "x_proj"): t[k] for k in (KEY, B)}),
        "adapts 'model.layers.0.self_attn.x_proj'",
    ),
}
B = KEY.replace("lora_A", "lora_B")


@pytest.mark.fault("damaged checkpoint or adapter")
@pytest.mark.parametrize("case", SHAPES)
def test_an_adapter_that_does_not_fit_is_refused_with_both_shapes(case, copies, readers):
    change, message = SHAPES[case]
    path = copies / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(RankFlowError, match=message):
        readers["load"](copies / "adapter", copies / "base")


CONFIGS = {
    "a module to import": (
        {"megatron_config": {"a": 1}, "megatron_core": "planted"},
        "imports nothing that a file names",
    ),
    "a cache of a start": ({"corda_config": {"cache_file": "x.pt"}}, "cache_file = 'x.pt'"),
    "a cache of another start": ({"lora_ga_config": {"cache_file": "/x"}}, "cache_file = '/x'"),
    "a rank that fills the memory": ({"r": 10**9}, "the rank 1000000000"),
    "a large rank that the file lacks": ({"r": 10**6}, "rank 1000000 in its|takes in"),
    "a negative rank": ({"r": -1}, "the rank -1 for 'r'"),
    "a rank that is text": ({"r": "2"}, "the rank '2' for 'r'"),
    "ranks that are no object": ({"rank_pattern": [1]}, r"rank_pattern = \[1\]"),
    "a pattern that is none": ({"rank_pattern": {"(": 2}}, r"the pattern '\('"),
    "an alpha that is text": ({"alpha_pattern": {"q_proj": "1"}}, "the alpha '1'"),
    "an alpha that overflows": ({"lora_alpha": 10**400}, "the alpha 1000"),
    "targets that are no names": ({"target_modules": [1]}, "write names of modules"),
    "a base that is no name": ({"base_model_name_or_path": ["x"]}, "write a hub id or a folder"),
    "a flag that is text": ({"use_dora": "yes"}, "use_dora = 'yes'"),
}


@pytest.mark.fault("damaged checkpoint or adapter")
@pytest.mark.parametrize("case", CONFIGS)
def test_a_hostile_configuration_is_refused_by_whatever_reads_an_adapter(
    case, copies, readers, mark
):
    values, message = CONFIGS[case]
    path = copies / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    for name, read in readers.items():
        if name == "inspect" and "large rank" in case:
            continue  # it shows the ranks of both
        with pytest.raises(RankFlowError, match=message):
            read(copies / "adapter", copies / "base")


TEXTS = {
    "a key that is there twice": (
        lambda text: text.replace("{", '{"r": 4, ', 1),
        "'r' is there twice",
    ),
    "a NaN": (lambda text: text.replace("{", '{"x": NaN, ', 1), "NaN is no number"),
    "too large a number": (lambda text: text.replace("{", '{"x": 1e999, ', 1), "too large"),
    "deep JSON": (lambda text: "[" * 10**5, "nested more than 32"),
    "a file cut short": (lambda text: text[:-10], "is not valid JSON"),
    "too many values": (lambda text: "[" + "1," * 10**6 + "1]", "1,000,001 values"),
    "too large a file": (lambda text: text + " " * (32 * 2**20), "has at most 33,554,432"),
}


@pytest.mark.fault("damaged checkpoint or adapter")
@pytest.mark.parametrize("case", TEXTS)
def test_a_configuration_that_is_no_strict_json_is_refused(case, copies, readers):
    change, message = TEXTS[case]
    path = copies / "adapter" / "adapter_config.json"
    path.write_text(change(path.read_text()))
    for read in readers.values():
        with pytest.raises(FileError, match=message):
            read(copies / "adapter", copies / "base")


def test_what_auto_classes_would_import_is_imported_by_nothing_here(copies, readers, mark):
    path = copies / "adapter" / "adapter_config.json"
    hostile = {
        "task_type": None,
        "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "planted"},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | hostile))
    for read in readers.values():
        read(copies / "adapter", copies / "base")


@pytest.mark.fault("damaged checkpoint or adapter")
def test_a_key_that_peft_would_drop_without_effect_is_refused(copies, readers, mark):
    path = copies / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_target_": "planted.run"}))
    with pytest.raises(RankFlowError, match=r"_target_ = 'planted.run', which this version"):
        readers["load"](copies / "adapter", copies / "base")


@pytest.mark.fault("damaged checkpoint or adapter")
@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../x", "", ".", "a\0b"])
def test_a_name_that_leads_out_of_a_folder_is_refused(name, tmp_path):
    with pytest.raises(FileError, match=r"leads out of the folder|is no path"):
        contained(tmp_path, name)


def test_links_of_the_hubs_cache_are_followed(tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "1f0c"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--org--name" / "blobs").mkdir()
    (snapshot / "config.json").symlink_to("../../blobs/0a")
    assert contained(snapshot, "config.json") == snapshot / "config.json"


def shard(name):
    def damage(base, payload):
        (base / "model.safetensors").rename(base.parent / "secret.safetensors")
        index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
        write_pickle(base / "weights.bin", payload)

    return damage


def edit_config(**values):
    def damage(base, _):
        path = base / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def only_pickle(base, payload):
    (base / "model.safetensors").unlink()
    write_pickle(base / "pytorch_model.bin", payload)


MODELS = {
    "a shard above the folder": (shard("../secret.safetensors"), "leads out of the folder"),
    "a shard anywhere": (shard("/etc/x.safetensors"), "leads out of the folder"),
    "a shard that is a pickle": (shard("weights.bin"), "only safetensors are read"),
    "a pickle alone": (only_pickle, "pytorch_model.bin and no safetensors file"),
    "an attention from elsewhere": (
        edit_config(attn_implementation="evil/kernel"),
        "compiled code from elsewhere",
    ),
    "code of its own": (
        edit_config(model_type="x", auto_map={"AutoConfig": "planted.Config"}),
        "custom code|cannot be read|cannot load",
    ),
    "weights cut short": (lambda base, _: cut(base / "model.safetensors", _), "end at byte"),
    "a configuration cut short": (lambda base, _: cut(base / "config.json", _), "not valid JSON"),
    "a configuration of nonsense": (edit_config(num_hidden_layers="two"), "cannot"),
}


@pytest.mark.fault("damaged checkpoint or adapter")
@pytest.mark.parametrize("case", MODELS)
def test_a_damaged_base_model_is_refused(case, copies, readers, payload):
    damage, message = MODELS[case]
    damage(copies / "base", payload)
    for name in ("load", "analyze"):
        with pytest.raises(RankFlowError, match=message):
            readers[name](copies / "adapter", copies / "base")


@pytest.mark.fault("damaged checkpoint or adapter")
@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "?"}}'),
        ("tokenizer_config.json", '{"a": 1, "a": 2}'),
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["planted.T", null]}}'),
        ("tokenizer_config.json", '{"tokenizer_class": "Nonsense"}'),
    ],
)
def test_a_damaged_tokenizer_is_refused(file, text, copies, readers, mark):
    (copies / "adapter" / "tokenizer_config.json").write_text("{}")
    (copies / "adapter" / file).write_text(text)
    with pytest.raises(FileError, match=r"cannot be read|not valid JSON"):
        find_tokenizer(copies / "adapter")
    with pytest.raises(FileError):
        readers["export"](copies / "adapter", copies / "base")


def test_a_tokenizer_cannot_link_to_a_file_elsewhere(copies):
    (copies / "adapter" / "tokenizer_config.json").symlink_to("/etc/hostname")
    with pytest.raises(FileError, match="leads out of the folder to /etc/hostname"):
        find_tokenizer(copies / "adapter")


def edit_state(**values):
    def change(header):
        state = json.loads(header["__metadata__"]["state"]) | values
        header["__metadata__"]["state"] = json.dumps(state)

    return change


STATES = {
    "scores that are not finite": (edit_state(demand=[float("nan")] * 4), "demand"),
    "too few ages": (edit_state(ages=[]), "ages has 0 values"),
    "ranks that are negative": (edit_state(ranks={"a": -1}), "ranks"),
    "ranks that are text": (edit_state(ranks={"a": "1"}), "ranks"),
    "a step behind the end": (edit_state(steps=11), "at step 11 of 10"),
    "a history of nonsense": (edit_state(history=[{"index": 0}]), "history"),
    "young components of none": (edit_state(young=[[], [], [], []]), "young does not count"),
    "no state": (lambda h: h["__metadata__"].pop("state") and None, "state"),
    "a key that is there twice": (
        lambda h: h["__metadata__"].update(
            state=h["__metadata__"]["state"].replace("{", '{"steps": 3, ', 1)
        ),
        "'steps' is there twice",
    ),
}


@pytest.mark.fault("damaged checkpoint or adapter")
@pytest.mark.parametrize("case", STATES)
def test_a_state_whose_values_make_no_sense_is_refused(case, copies, edit_header):
    change, message = STATES[case]
    edit_header(copies / "checkpoint" / STATE_FILE, change)
    with pytest.raises(CheckpointError, match=rf"is damaged .*{message}.*older checkpoint"):
        load_state(copies / "checkpoint")


EVENT = {
    "schema": 1,
    "index": 0,
    "step": 5,
    "limit": 64,
    "spent_before": 64,
    "spent": 32,
    "ranks_before": {"q": 2},
    "ranks": {"q": 1},
    "importance": {"q": 0.5},
    "pruned": [],
    "born": [],
    "seconds": 0.1,
}


@pytest.mark.fault("damaged checkpoint or adapter")
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ranks": {}, "ranks_before": {}, "importance": {}}, "name different sites"),
        ({"ranks": {"v": 1}}, "name different sites"),
        ({"ranks": {"q": -1}}, "it counts -1"),
        ({"ranks": {"q": "many"}}, "not an event"),
        ({"schema": 9}, "not an event"),
    ],
)
def test_a_damaged_log_of_events_is_refused_by_its_line(values, message, tmp_path):
    lines = [json.dumps(EVENT), json.dumps(EVENT | values), ""]
    (tmp_path / EVENTS_FILE).write_text("\n".join(lines))
    with pytest.raises(RankFlowError, match=f"line 2: .*{message}"):
        read_run(tmp_path)


@pytest.mark.parametrize("line", ['{"schema": 1, "schema": 1}', '{"schema": NaN}', "[" * 10**5])
def test_a_line_that_is_no_strict_json_is_no_event(line, tmp_path):
    (tmp_path / EVENTS_FILE).write_text(line + "\n")
    with pytest.raises(RankFlowError, match="line 1: not an event"):
        read_run(tmp_path)


MEGABYTE = 2**20
HOSTILE = {
    "a header of 200 MB": (200 * MEGABYTE, b"{", 1),
    "a header of brackets": (20 * MEGABYTE, b"[],", 3),
    "a header of closing brackets": (20 * MEGABYTE, b"]", 3),
    "a header of one string": (20 * MEGABYTE, b'\\"', 4),
    "a header of numbers": (20 * MEGABYTE, b"1,", 3),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_takes_no_more_memory_than_a_few_times_the_file(case, tmp_path):
    size, unit, times = HOSTILE[case]
    path = tmp_path / "x.safetensors"
    text = unit * (size // len(unit))
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    del text
    tracemalloc.start()
    try:
        with pytest.raises(FileError, match="is damaged"):
            read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < times * size


def test_the_values_that_strict_json_allows_take_a_bounded_memory():
    text = b"[" + b"[]," * 199_999 + b"[]]"
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="values"):
            parse_json(text, most_values=300_000)
        assert len(parse_json(text, most_values=500_000)) == 200_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 30 * MEGABYTE


def test_a_whole_folder_passes_every_check(copies, readers):
    check_model(copies / "base")
    for read in readers.values():
        read(copies / "adapter", copies / "base")
    assert load_state(copies / "checkpoint")["total_steps"] == 10


def test_nothing_loads_tensors_or_code_past_the_checks():
    """No call that could unpickle or run the code of a file."""
    root = Path(__file__).parents[3] / "rankflow"
    for path in root.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for call in ("torch.load(", "pickle.load", "trust_remote_code=True", "weights_only=False"):
            assert call not in text, f"{path} calls {call}"


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__['os'].mkdir(MARK) }}",
    "{{ messages.__init__.__self__.append(1) }}",
    "{% for m in messages %}{{ m.update({'role': 'x'}) }}{% endfor %}",
    "{{ range(10 ** 9) | list }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template_does_not_leave_its_sandbox(template, mark):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0})))
    tokenizer.chat_template = template.replace("MARK", repr(str(mark)))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(RankFlowError, match="the chat template, on the conversation"):
        Conversation(tokenizer, messages)


@pytest.mark.fault("damaged checkpoint or adapter")
def test_an_optimizer_that_is_a_hostile_pickle_is_never_run_on_resuming(tmp_path, payload, llama):
    def make(folder):
        model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
        rows = [{"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([1, 2, 3])}] * 4
        arguments = TrainingArguments(
            str(folder), max_steps=6, save_steps=3, use_cpu=True, disable_tqdm=True
        )
        budget = BudgetSpec(rank=1)
        return RankFlowTrainer(model=model, args=arguments, train_dataset=rows, budget=budget)

    make(tmp_path / "run").train()
    checkpoint = tmp_path / "run" / "checkpoint-3"
    for name in ("optimizer.pt", "scheduler.pt"):
        whole = (checkpoint / name).read_bytes()
        torch.save(payload, checkpoint / name)
        with pytest.raises(CheckpointError, match=name):
            make(tmp_path / "run").train(resume_from_checkpoint=str(checkpoint))
        (checkpoint / name).write_bytes(whole)
