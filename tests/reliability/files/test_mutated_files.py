"""Mutations of a small adapter and of a checkpoint: refused, or loaded as exactly what they say.

A flipped bit in a tensor of a bare adapter makes another finite number, which nobody can notice: it
must then load as that number. Only folders with a manifest of checksums notice it.
"""

import json
import math
import random
import shutil
import struct
import tempfile
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from rankflow.checkpoint import STATE_FILE, load_state
from rankflow.durable import find_damage, seal
from rankflow.errors import RankFlowError
from rankflow.tensor_files import read_header

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MEGABYTE = 2**20
HOSTILE = [
    *(None, True, -1, 0, 1, 3, 2**31, 2**63, 2**64, 10**400, 0.5, 1e308, float("nan")),
    *("", "planted", "../x", "/etc/hostname", "F64", "I8", "\0", "\ud800", "(a+)+$", "all-linear"),
    *([], [[]], [0, 0], [2**62, 4], {}, {"a": 1}, ["planted.run"], {"cache_file": "x"}),
]
KEYS = ["dtype", "shape", "r", "target_modules", "megatron_config", "auto_mapping", "a", "_target_"]


def flip(content, random):
    content = bytearray(content)
    for _ in range(random.randint(1, 4)):
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    return bytes(content)


def truncate(content, random):
    return content[: random.randrange(len(content))]


def splice(content, random):
    start, stop = sorted(random.randrange(len(content) + 1) for _ in range(2))
    place = random.randrange(len(content) + 1)
    return (
        content[:place] + content[start:stop] + content[place + random.choice([0, stop - start]) :]
    )


def flip_text(content, random):
    """Flip bits where they mean most: in the length and the header of a file of tensors."""
    length = min(len(content), 8 + 1200)
    return flip(content[:length], random) + content[length:]


def mutate_value(value, random):
    """Change one thing somewhere in JSON."""
    if isinstance(value, dict) and value and random.random() < 0.85:
        key = random.choice(sorted(value))
        action = random.random()
        if action < 0.7:
            return value | {key: mutate_value(value[key], random)}
        rest = {k: v for k, v in value.items() if k != key}
        if action < 0.8:
            return rest
        return rest | {random.choice([*KEYS, key + "x"]): value[key]}
    if isinstance(value, list) and value and random.random() < 0.6:
        place = random.randrange(len(value))
        return [*value[:place], mutate_value(value[place], random), *value[place + 1 :]]
    if isinstance(value, int) and random.random() < 0.5:
        return value + random.choice([-4, -1, 1, 4])
    return random.choice(HOSTILE)


def edit_json(content, random):
    """Mutate the JSON of a configuration, of a header, or of a state within a header."""
    is_tensors = content[8:9] == b"{"
    length = struct.unpack("<Q", content[:8])[0] if is_tensors else 0
    header = json.loads(content[8 : 8 + length] if is_tensors else content)
    state = header.get("__metadata__", {}).get("state") if is_tensors else None
    if state is not None and random.random() < 0.7:
        header["__metadata__"]["state"] = json.dumps(mutate_value(json.loads(state), random))
    else:
        header = mutate_value(header, random)
    text = json.dumps(header).encode()
    if random.random() < 0.1 and text.startswith(b"{"):
        text = b"{" + text[1:-1] + b", " + text[1:]  # every key twice
    return struct.pack("<Q", len(text)) + text + content[8 + length :] if is_tensors else text


def edit_number(content, random):
    """Write a number of the file over: one that is hostile to arithmetic, perhaps not finite."""
    value = random.choice([math.nan, math.inf, 0.0, -0.0, 3e38, 1e-45, 1.0])
    places = range(len(content) - 4, max(0, len(content) - 400), -4)
    place = random.choice(list(places)) if places else 0
    return content[:place] + struct.pack("<f", value) + content[place + 4 :]


MUTATIONS = [flip, flip_text, truncate, splice, edit_json, edit_number]


def mutate(content, seed):
    """Return other bytes, the same ones for a seed."""
    chance = random.Random(seed)
    return chance.choice(MUTATIONS)(content, chance)


def says(path):
    """What the bytes of a file of tensors say, read by numpy alone."""
    content = path.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(content[start:], np.uint8)[slice(*entry["data_offsets"])].tobytes()
        for name, entry in header.items()
    }


def as_bytes(tensor):
    return (
        tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    )


def check_adapter(folder, base, readers):
    """Read an adapter in every way; where it is accepted, it must be what the bytes say."""
    outcomes = {}
    for name, read in readers.items():
        try:
            outcomes[name] = read(folder, base)
        except RankFlowError:
            continue
    if "load" in outcomes:
        model, found = outcomes["load"], says(folder / WEIGHTS)
        live = {
            key.replace(".default", ""): value
            for key, value in model.state_dict().items()
            if ".lora_" in key
        }
        for key, value in live.items():
            assert torch.isfinite(value).all()
            assert read_header(folder / WEIGHTS).tensors[key].dtype != "F32" or (
                as_bytes(value) == found[key]
            ), key
    if "export" in outcomes:
        assert says(outcomes["export"] / WEIGHTS).items() >= {
            (key, value) for key, value in says(folder / WEIGHTS).items() if key.endswith("weight")
        }
    return bool(outcomes)


def run_adapter(originals, readers, seed, mark, ways):
    """Mutate one file of an adapter and read it; return whether anything accepted it."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory(dir=mark.parent) as place:
        folder = Path(shutil.copytree(originals / "adapter", Path(place) / "adapter"))
        path = folder / chance.choice([CONFIG, WEIGHTS, WEIGHTS])
        path.write_bytes(mutate(path.read_bytes(), seed))
        tracemalloc.start()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of PEFT, for keys that make no difference
                chosen = {name: readers[name] for name in ways}
                accepted = check_adapter(folder, originals / "base", chosen)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 100 * MEGABYTE, f"{peak:,} bytes"
    assert not mark.exists(), "code was executed"
    return accepted


def run_state(originals, seed):
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / STATE_FILE
        path.write_bytes(mutate((originals / "checkpoint" / STATE_FILE).read_bytes(), seed))
        try:
            state = load_state(place)
        except RankFlowError:
            return
        found = says(path)
        loaded = {
            f"{part}.{key}": tensor
            for part in ("scorer", "sketch", "gated")
            for key, tensor in state[part].items()
        }
        assert {key: as_bytes(tensor) for key, tensor in loaded.items()} == found
        assert all(torch.isfinite(t).all() for t in loaded.values() if t.is_floating_point())
        assert len(state["ages"]) == sum(state["ranks"].values())
        assert np.isfinite(state["demand"]).all()


LIGHT = ("inspect", "export", "compress")
FAULT = "damaged checkpoint or adapter"


@pytest.mark.fault(FAULT)
def test_a_mutated_adapter_is_refused_or_read_as_it_is(
    originals, readers, mark, is_full, count_injections
):
    seeds = range(1000 if is_full else 100)
    count_injections(len(seeds))
    for seed in seeds:
        heavy = is_full or seed % 5 == 0  # the other readers load the base model too
        run_adapter(originals, readers, seed, mark, tuple(readers) if heavy else LIGHT)


@pytest.mark.fault(FAULT)
def test_a_mutated_state_is_refused_or_loaded_as_it_is(originals, is_full, count_injections):
    seeds = range(1000 if is_full else 100)
    count_injections(len(seeds))
    for seed in seeds:
        run_state(originals, seed)


@pytest.mark.fault(FAULT)
def test_a_mutated_file_of_a_sealed_checkpoint_is_always_noticed(
    originals, tmp_path, is_full, count_injections
):
    seeds = range(1000 if is_full else 100)
    count_injections(len(seeds))
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(originals / "adapter", folder)
    shutil.copy(originals / "checkpoint" / STATE_FILE, folder)
    seal(folder)
    files = sorted(path for path in folder.iterdir())
    assert find_damage(folder) is None
    for seed in seeds:
        path = random.Random(seed).choice(files)
        whole = path.read_bytes()
        mutated = mutate(whole, seed)
        path.write_bytes(mutated)
        assert find_damage(folder) is not None or mutated == whole, (path, seed)
        path.write_bytes(whole)
    assert find_damage(folder) is None
