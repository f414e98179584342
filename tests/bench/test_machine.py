from dataclasses import replace

import pytest

from rankflow.bench.ledger import Operation
from rankflow.bench.machine import H200, Machine, calibrate

SLOW = Machine(flops=2e11, wide_flops=1e11, bandwidth=2e10, latency=4e-6, overlaps=False)
PRODUCT = Operation("mm", flops=10**9, bytes=10**8, is_wide=False)
WIDE = replace(PRODUCT, is_wide=True)
COPY = Operation("copy", flops=0, bytes=10**8, is_wide=False)
NOTHING = Operation("add", flops=0, bytes=4, is_wide=False)


def test_a_machine_that_does_one_thing_at_a_time_adds_up():
    assert SLOW.seconds([PRODUCT]) == pytest.approx(4e-6 + 5e-3 + 5e-3)
    assert SLOW.seconds([WIDE, COPY]) == pytest.approx(8e-6 + 1e-2 + 2 * 5e-3)


def test_a_machine_that_overlaps_takes_the_longest():
    fast = replace(SLOW, overlaps=True)
    assert fast.seconds([WIDE, COPY]) == pytest.approx(1e-2 + 5e-3)
    assert fast.seconds([NOTHING]) == pytest.approx(4e-6)


def test_the_constants_of_a_machine_are_found_from_what_it_took():
    truth = replace(SLOW, wide_flops=SLOW.flops)
    pairs = [
        ([PRODUCT] * 3 + [NOTHING] * 1000, [PRODUCT]),
        ([COPY] * 4, [NOTHING] * 5),
        ([PRODUCT, COPY, *[NOTHING] * 5000], [COPY]),
        ([replace(PRODUCT, flops=10**11)], [NOTHING]),
    ]
    seconds = [truth.seconds(more) - truth.seconds(less) for more, less in pairs]
    found = calibrate(pairs, seconds)
    assert found.flops == pytest.approx(truth.flops, rel=1e-3)
    assert found.bandwidth == pytest.approx(truth.bandwidth, rel=1e-3)
    assert found.latency == pytest.approx(truth.latency, rel=1e-3)


def test_the_h200_is_faster_in_low_precision():
    assert H200.seconds([replace(PRODUCT, flops=10**12)]) < H200.seconds(
        [replace(WIDE, flops=10**12)]
    )
