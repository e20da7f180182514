"""What a handful of samples says: median and quartiles, and the ratio of two peers paired round by round."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence

RESAMPLES = 2000
LEVEL = 0.95
Interval = dict[str, float | int | None]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; a single value is all three."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def paired_ratio(baseline: Sequence[float], other: Sequence[float]) -> Interval:
    """How many times faster ``other`` is: the median over rounds of baseline / other, with its bootstrap interval.

    A slow moment of the machine hits both peers of a round, so it leaves their ratio alone. Logarithms, so that the
    ratio of A to B is one over that of B to A.
    """
    logs = [math.log(b / o) for b, o in zip(baseline, other, strict=True)]
    return _interval(logs, math.exp)


def paired_difference(baseline: Sequence[float], other: Sequence[float]) -> Interval:
    """``other - baseline``: the median over rounds with its bootstrap interval."""
    return _interval([o - b for b, o in zip(baseline, other, strict=True)], lambda value: value)


def geometric_mean(ratios: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, ratios)))


def _interval(values: Sequence[float], back: Callable[[float], float]) -> Interval:
    """Median with the percentile bootstrap over rounds; no ends from fewer than four rounds.

    The percentile interval of a median of so few values is narrow; it says how much the rounds of this run disagree,
    not how much another day would.
    """
    if not values:
        return {"value": None, "low": None, "high": None, "rounds": 0}
    result: Interval = {"value": back(statistics.median(values)), "low": None, "high": None, "rounds": len(values)}
    if len(values) >= 4:
        generator = random.Random(len(values))  # the same samples must give the same interval
        medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(RESAMPLES))
        out = round((1 - LEVEL) / 2 * RESAMPLES)
        result |= {"low": back(medians[out]), "high": back(medians[-1 - out])}
    return result
