"""Numbers as texts, with as many digits as they deserve."""

import math
from collections.abc import Collection
from typing import Final

NOTHING: Final = "-"

_MOST_DECIMALS: Final = 6


def decimals_of(halves: Collection[float], values: Collection[float]) -> int:
    """Return the decimals of a column: two digits of its usual interval, else four of its values.

    Args:
        halves: Half width of each interval; those that are not positive and finite do not count.
        values: The means.

    >>> decimals_of([0.0031, 0.0052, 0.0044], [0.4792, 0.4801, 0.4640])
    4
    >>> decimals_of([float("nan")], [0.4792])
    4
    """
    sizes = sorted(half for half in halves if 0 < half < math.inf)
    if sizes:
        return _decimals(sizes[len(sizes) // 2], digits=2)
    sizes = sorted(abs(value) for value in values if 0 < abs(value) < math.inf)
    return _decimals(sizes[len(sizes) // 2], digits=4) if sizes else 1


def with_interval(mean: float, half: float, decimals: int) -> str:
    """Return a mean and the half width of its interval.

    >>> with_interval(0.4792, 0.0031, 4), with_interval(0.4792, float("nan"), 3)
    ('0.4792 ± 0.0031', '0.479')
    """
    if not math.isfinite(mean):
        return NOTHING
    return f"{mean:.{decimals}f}" + (f" ± {half:.{decimals}f}" if math.isfinite(half) else "")


def significant(value: float | None, digits: int = 3) -> str:
    """Return a number with so many significant digits, without an exponent where it is readable.

    >>> significant(0.0123456), significant(1234.5), significant(None)
    ('0.0123', '1234', '-')
    """
    if value is None or not math.isfinite(value):
        return NOTHING
    if value == 0 or not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits}g}"
    return f"{value:.{_decimals(abs(value), digits)}f}"


def duration(seconds: float | None) -> str:
    """Return a time in a unit that suits it.

    >>> duration(0.0123), duration(1.5), duration(None)
    ('12.3 ms', '1.50 s', '-')
    """
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    return f"{significant(1000 * seconds)} ms" if seconds < 1 else f"{significant(seconds)} s"


def megabytes(size: float | None) -> str:
    """Return a number of bytes in MB, 10^6 bytes.

    >>> megabytes(12_345_678)
    '12.3 MB'
    """
    return NOTHING if size is None else f"{significant(size / 1e6)} MB"


def times(ratio: float | None) -> str:
    """Return a ratio.

    >>> times(1.2345)
    '1.23x'
    """
    return NOTHING if ratio is None or not math.isfinite(ratio) else f"{ratio:.2f}x"


def probability(p: float) -> str:
    """Return a p-value.

    >>> probability(0.0004), probability(0.0312), probability(0.25)
    ('< 0.001', '0.031', '0.25')
    """
    if not math.isfinite(p):
        return NOTHING
    if p < 0.001:
        return "< 0.001"
    return f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def change(difference: float, relative: bool) -> str:
    """Return a signed difference; a log ratio as the per cent that it is.

    >>> change(-0.02, relative=True), change(0.0123, relative=False)
    ('-2.0%', '+0.0123')
    """
    if not math.isfinite(difference):
        return NOTHING
    if not relative:
        return f"{difference:+.3g}"
    percent = 100 * math.expm1(difference)
    return f"{percent:+.1f}%" if abs(percent) >= 0.1 or percent == 0 else f"{percent:+.1g}%"


def whole_range(values: Collection[int]) -> str:
    """Return a whole number, or the range of several.

    >>> whole_range([41472, 41472]), whole_range([41000, 41472]), whole_range([])
    ('41,472', '41,000 to 41,472', '-')
    """
    if not values:
        return NOTHING
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def share_range(parts: Collection[int], whole: int) -> str:
    """Return the share of a whole in per cent, or the range of several.

    >>> share_range([1004], 1000), share_range([900, 1000], 1000)
    ('100.4%', '90.0% to 100.0%')
    """
    if not parts or not whole:
        return NOTHING
    low, high = (f"{100 * part / whole:.1f}%" for part in (min(parts), max(parts)))
    return low if low == high else f"{low} to {high}"


def _decimals(size: float, digits: int) -> int:
    return min(max(digits - 1 - math.floor(math.log10(size)), 0), _MOST_DECIMALS)
