import json
from io import StringIO

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from rankflow.errors import RankFlowError
from rankflow.export.compare import compare_folders, read_allocation
from rankflow.records import RankEvent
from rankflow.report.events import EventLog


def write_run(folder, ranks, magnitudes=None, spent=900):
    log = EventLog(folder / "events.jsonl")
    first = dict.fromkeys(ranks, 9)
    log(RankEvent(0, 5, 999, 999, 999, first, first, {}, (), (), 0.1))
    log(RankEvent(1, 9, 999, 999, spent, first, ranks, {}, (), (), 0.1, magnitudes or {}))
    return folder


def write_adapter(folder, *, trained=None):
    """Rank 3 and a magnitude at q, rank 1 at v: 36 + 5 + 12 parameters."""
    folder.mkdir()
    weights = {
        f"base_model.model.h.0.{site}.lora_{part}.weight": np.zeros(shape, np.float32)
        for site, part, shape in (
            ("q", "A", (3, 7)),
            ("q", "B", (5, 3)),
            ("q", "magnitude_vector", (5,)),
            ("v", "A", (1, 7)),
            ("v", "B", (5, 1)),
        )
    }
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "rank_pattern": {"h.0.v": 1}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "rankflow.json").write_text(json.dumps({"trained_parameters": trained}))
    return folder


def printed(*folders, png=None):
    console = Console(file=StringIO(), width=80)
    compare_folders(*folders, png=png, console=console)
    return console.file.getvalue()


def test_a_run_and_an_adapter_are_compared(tmp_path):
    run = write_run(
        tmp_path / "run", {"h.0.q": 4, "h.0.v": 1, "h.1.q": 2}, {"h.0.q": False, "h.0.v": True}
    )
    lines = [line.split() for line in printed(run, write_adapter(tmp_path / "adapter")).split("\n")]
    assert ["0", "-1•", "0◦"] in lines
    assert ["1", "A", "·"] in lines
    assert ["only", "in", "A:", "h.1.q", "(rank", "2)"] in lines
    assert ["components", "7", "4", "-3"] in lines
    assert ["magnitudes", "1", "1", "+0"] in lines
    assert ["parameters", "900", "53", "-847"] in lines


def test_a_run_counts_after_its_last_event(tmp_path):
    run = write_run(tmp_path / "run", {"h.0.q": 4})
    assert read_allocation(run).ranks == {"h.0.q": 4}


@pytest.mark.parametrize(("trained", "is_told"), [(41, True), (53, False), (None, False)])
def test_what_an_adapter_stores_beyond_its_training_is_told(trained, is_told, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", trained=trained)
    words = " ".join(printed(adapter, write_run(tmp_path / "run", {"h.0.q": 4})).split())
    assert ("A: The file holds 53 parameters and 41 are trained" in words) is is_told
    assert "B: The file" not in words


def test_the_difference_is_drawn_on_request(tmp_path):
    runs = [write_run(tmp_path / name, {"h.0.q": rank}) for name, rank in (("a", 1), ("b", 2))]
    assert "Heatmap written to" in printed(*runs, png=tmp_path / "difference.png")
    assert (tmp_path / "difference.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_is_neither_is_refused_by_name(tmp_path):
    run = write_run(tmp_path / "run", {"h.0.q": 4})
    with pytest.raises(RankFlowError, match=f"{tmp_path} holds neither adapter_config.json nor"):
        printed(run, tmp_path)
