import logging
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from rankflow.adapters.kernels import choose
from rankflow.adapters.kernels.choose import fits


@pytest.fixture(autouse=True)
def unasked(monkeypatch):
    """Nothing is known of any device, and nothing is set."""
    monkeypatch.setattr(choose, "_works", {})
    monkeypatch.delenv("RANKFLOW_TRITON", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels seem to run on the CPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(choose, "find_spec", lambda name: object())


@pytest.fixture
def gpu(monkeypatch):
    """There seems to be a GPU; the list grows by an entry for every probe of it."""
    probes = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    probe = type(sys)("rankflow.adapters.kernels.probe")
    probe.probe = probes.append
    monkeypatch.setitem(sys.modules, probe.__name__, probe)
    return probes


def test_kernels_do_not_run_on_a_cpu():
    assert not fits(torch.zeros(2))


def test_kernels_run_on_a_cpu_in_the_interpreter(interpreted, monkeypatch):
    assert fits(torch.zeros(2), nn.Parameter(torch.zeros(2)).bfloat16(), torch.zeros(2).half())
    monkeypatch.setattr(choose, "find_spec", lambda name: None)
    assert not fits(torch.zeros(2))


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(2, dtype=torch.float64),
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(2, device="meta"),
        nn.Buffer(torch.zeros(2)).as_subclass(type("Sharded", (torch.Tensor,), {})),
    ],
    ids=["float64", "int64", "elsewhere", "subclass"],
)
def test_kernels_do_not_run_on_tensors_that_they_cannot_read(other, interpreted):
    assert not fits(torch.zeros(2), other)
    assert not fits(other, torch.zeros(2))


def test_kernels_are_turned_off_by_the_environment(interpreted, monkeypatch):
    monkeypatch.setenv("RANKFLOW_TRITON", "0")
    assert not fits(torch.zeros(2))


def test_a_gpu_is_asked_once(gpu):
    assert choose._can_run("cuda", 0)
    assert choose._can_run("cuda", 0)
    assert choose._can_run("cuda", 1)
    assert gpu == [torch.device("cuda", 0), torch.device("cuda", 1)]


def test_a_gpu_is_not_asked_where_kernels_are_turned_off(gpu, monkeypatch):
    monkeypatch.setenv("RANKFLOW_TRITON", "0")
    assert not choose._can_run("cuda", 0)
    assert gpu == []


def test_a_gpu_is_not_asked_while_a_graph_is_captured(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not choose._can_run("cuda", 0)
    assert gpu == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choose._can_run("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose._can_run("cuda", 0)


def test_a_gpu_on_which_kernels_fail_is_named_once_and_left_alone(gpu, monkeypatch, caplog):
    def fail(device):
        gpu.append(device)
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(sys.modules["rankflow.adapters.kernels.probe"], "probe", fail)
    with caplog.at_level(logging.WARNING):
        assert not choose._can_run("cuda", 3)
        assert not choose._can_run("cuda", 3)
    assert len(gpu) == 1
    (record,) = caplog.records
    told = record.getMessage()
    assert all(
        part in told for part in ("cuda:3", "Failed to find C compiler", "RANKFLOW_TRITON=0")
    )


def test_a_gpu_without_triton_is_left_alone(gpu, monkeypatch, caplog):
    monkeypatch.delitem(sys.modules, "rankflow.adapters.kernels.probe")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not choose._can_run("cuda", 0)
    assert "triton" in caplog.text


def test_a_gpu_older_than_the_kernels_is_left_alone(gpu, monkeypatch, caplog):
    pytest.importorskip("triton")
    monkeypatch.delitem(sys.modules, "rankflow.adapters.kernels.probe")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not choose._can_run("cuda", 0)
    assert "compute capability 8.0, and it has (7, 5)" in caplog.text


def test_the_answer_is_a_constant_of_compiled_code(monkeypatch):
    if not torch._dynamo.is_dynamo_supported():
        pytest.skip("torch.compile does not support this platform")
    torch._dynamo.reset()

    def sign(x):
        return x if fits(x) else -x

    compiled = torch.compile(sign, fullgraph=True, backend="eager")
    assert compiled(torch.ones(2)).tolist() == [-1, -1]
    torch._dynamo.reset()


def test_nothing_loads_triton_before_it_is_used():
    code = """
import sys
sys.modules["triton"] = None  # any import of it fails
import torch
from rankflow.adapters.dora import accelerate_dora
from rankflow.adapters.row_norms import row_norms_of_sum
assert row_norms_of_sum(torch.eye(2), torch.ones(1, 2), torch.ones(2, 1), 1.0).tolist()
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
