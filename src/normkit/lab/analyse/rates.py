"""The learning-rate search, told: what every rate did, and over which range an arm is usable."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from normkit.lab.analyse.curves import middle
from normkit.lab.analyse.directory import number
from normkit.lab.analyse.intervals import Finish, median_finish
from normkit.vocabulary.record import Record


def sensitivity(cells: Sequence[Record]) -> list[dict[str, Any]]:
    """One row per learning rate of the search, ascending: how many seeds reached the target, diverged, failed, when."""
    by_rate: dict[float, list[Record]] = {}
    for cell in cells:
        if cell.finished:
            by_rate.setdefault(float(cell.config["lr"]), []).append(cell)
    return [_rate(lr, by_rate[lr]) for lr in sorted(by_rate)]


def _rate(lr: float, cells: Sequence[Record]) -> dict[str, Any]:
    ran = [cell for cell in cells if cell.state != "failed"]
    race = median_finish([Finish(number(cell, "steps_to_target"), cell.config.get("steps", 0)) for cell in ran])
    return {
        "lr": lr,
        "seeds": len(cells),
        "reached": race["reached"],
        "diverged": sum(cell.state == "diverged" for cell in cells),
        "failed": len(cells) - len(ran),
        "steps_to_target": race["median"],
        "best_validation": middle(number(cell, "best_validation") for cell in ran),
    }


def usable_range(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The widest stretch of neighbouring rates at which more than half of the search seeds reach the target."""
    return _widest(rows, lambda row: 2 * row["reached"] > row["seeds"])


def stable_range(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The widest stretch of neighbouring rates at which more than half of the search seeds do not diverge or fail."""
    return _widest(rows, lambda row: 2 * (row["seeds"] - row["diverged"] - row["failed"]) > row["seeds"])


def _widest(rows: Sequence[dict[str, Any]], good: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    """Width in decades, log10(highest / lowest); open_low, open_high: it ends only because the grid does."""
    stretches: list[list[int]] = [[]]
    for index, row in enumerate(rows):
        if good(row):
            stretches[-1].append(index)
        else:
            stretches.append([])
    best = max(stretches, key=len)
    if not best:
        return None
    low, high = rows[best[0]]["lr"], rows[best[-1]]["lr"]
    return {
        "low": low,
        "high": high,
        "decades": math.log10(high / low),
        "rates": len(best),
        "of": len(rows),
        "open_low": best[0] == 0,
        "open_high": best[-1] == len(rows) - 1,
    }
