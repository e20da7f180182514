"""The choice of a learning rate: a criterion fixed in advance, the same for every arm and for the baseline.

1. The median over the search seeds of the steps to the target (of an even number of seeds the upper median); a run
   that never gets there counts as infinitely long.
2. Where medians are equal (also: all infinite): the median over the seeds of the best validation metric.
3. Where that is equal too: the smaller rate, which is the safer one.

The first is the question itself ("how fast does it get there?"). The second decides when a target is out of reach, and
between rates that need the same number of steps. A diverged run counts as a run that never got there.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from normkit.lab.experiment import Metric
from normkit.lab.recipe import EXTENSIONS


@dataclass(frozen=True)
class Choice:
    """The rate of an arm; bound_hit: "low" or "high" when the search ended on that edge, so a better rate may exist."""

    lr: float
    bound_hit: str | None = None

    def record(self) -> dict[str, Any]:
        return {"lr": self.lr, "bound_hit": self.bound_hit}


def best_rate(results: Mapping[float, Sequence[Mapping[str, Any]]], metric: Metric) -> float | None:
    """The rate to take, from the status of every search run at every rate; None when every run failed (crashed)."""
    usable = {lr: runs for lr, runs in results.items() if any(run["state"] != "failed" for run in runs)}
    if not usable:
        return None
    return min(usable, key=lambda lr: _rank(lr, usable[lr], metric))


def _rank(lr: float, runs: Sequence[Mapping[str, Any]], metric: Metric) -> tuple[float, float, float]:
    steps = [_or(run.get("steps_to_target"), math.inf) for run in runs]
    values = [_or(run.get("best_validation"), metric.worst) for run in runs]
    value = statistics.median(values)
    return statistics.median_high(steps), -value if metric.higher_is_better else value, lr


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None or math.isnan(value) else value


def extend(rates: Sequence[float], best: Mapping[str, float | None], base: Sequence[float]) -> tuple[float, ...]:
    """The rates to add because an arm's best lies on an edge; () when none does or the bound is reached.

    All arms get the added rates, so that the grid stays the same for every arm. Each side grows one step at a time,
    at most EXTENSIONS steps beyond the base grid.
    """
    ordered = sorted(rates)
    below = sum(lr < min(base) for lr in ordered)
    above = sum(lr > max(base) for lr in ordered)
    chosen = [lr for lr in best.values() if lr is not None]
    added = []
    if ordered[0] in chosen and below < EXTENSIONS:
        added.append(_beyond(base, below, down=True))
    if ordered[-1] in chosen and above < EXTENSIONS:
        added.append(_beyond(base, above, down=False))
    return tuple(added)


def choose(rates: Sequence[float], best: Mapping[str, float | None]) -> dict[str, Choice]:
    """The final choice per arm, with the bound it hit if its best still lies on an edge of the extended grid."""
    low, high = min(rates), max(rates)
    return {
        arm: Choice(lr, "low" if lr == low else "high" if lr == high else None)
        for arm, lr in best.items()
        if lr is not None
    }


def _beyond(base: Sequence[float], already: int, down: bool) -> float:
    """The next grid step beyond an edge, `already` steps beyond the base grid: 0.003, 0.01, ... goes on with 0.001.

    A 1-3-10 grid repeats after two steps; the ratio of a single step would leave the pattern.
    """
    ordered = sorted(base)
    two_steps = ordered[2] / ordered[0] if down else ordered[-1] / ordered[-3]
    pattern = ordered[1 - already % 2] if down else ordered[already % 2 - 2]
    factor = two_steps ** (already // 2 + 1)
    return float(f"{pattern / factor if down else pattern * factor:.6g}")
