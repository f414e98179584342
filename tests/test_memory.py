import pytest
import torch
from torch import nn

from rankflow.memory import peak_bytes

CPU = torch.device("cpu")
FLOAT = 4


def two_at_a_time():
    a = torch.ones(1000)
    b = a * 2
    del a
    return (b + 1).view(10, 100).T


def in_place():
    return torch.ones(1000).add_(1).mul_(2).view(-1)[3:]


def one_after_another():
    for _ in range(5):
        torch.ones(1000)


def kept_for_backward():
    x = torch.ones(1000, requires_grad=True)
    return x.exp().exp().exp()


def nothing():
    return None


@pytest.mark.parametrize(
    ("compute", "floats"),
    [(two_at_a_time, 2000), (in_place, 1000), (one_after_another, 1000), (nothing, 0)],
)
def test_the_peak_counts_what_lives_at_the_same_time(compute, floats):
    assert peak_bytes(compute, CPU) == FLOAT * floats


def test_the_peak_counts_what_autograd_keeps():
    assert peak_bytes(kept_for_backward, CPU) == FLOAT * 4000
    with torch.no_grad():
        assert peak_bytes(kept_for_backward, CPU) == FLOAT * 3000


def test_the_peak_is_the_profilers():
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    x = torch.randn(32, 64)

    def train():
        model(x).square().sum().backward()
        model.zero_grad(set_to_none=True)

    train()
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        train()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert peak_bytes(train, CPU) == pytest.approx(peak, rel=0.05)
