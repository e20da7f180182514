"""The comparison of strategies -> the table of docs/strategies.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from normkit.report import numbers as n
from normkit.report.document import Table


def table(summary: Mapping[str, Any], gaps: Mapping[str, Mapping[str, Any]]) -> Table:
    """Every arm: the metric, the difference to the one that never changes, what diverged, the jump, the time of a step.

    gaps: by arm, the paired difference.
    """
    metric = summary["experiment"]["metric"]
    header = [
        "arm",
        "rate",
        f"test {metric['name']}",
        "difference" if metric["higher_is_better"] else "difference (less is better)",
        "diverged",
        "jump in training",
        "jump in evaluation",
        "step after / before",
    ]
    rows = [_row(arm, gaps.get(arm["name"]), metric) for arm in summary["points"][0]["arms"]]
    return Table(header, rows, numeric=frozenset(range(1, len(header))))


def _row(arm: Mapping[str, Any], gap: Mapping[str, Any] | None, metric: dict[str, Any]) -> list[str]:
    found = arm.get("switches") or {}
    jumps = [n.significant(found.get(f"moved_in_{mode}"), 2) for mode in ("training", "evaluation")]
    before, after = found.get("ms_per_step_before"), found.get("ms_per_step_after")
    return [
        f"`{arm['name'].replace('->', ' -> ').replace('+', ' ')}`",
        n.rate(arm["lr"]),
        n.metric_interval(arm["test"], metric),
        n.NOTHING if gap is None else n.difference(dict(gap), metric),
        f"{arm['runs']['diverged']} of {arm['runs']['finished']}",
        *jumps,
        f"{n.factor(after / before)}×" if before and after else n.NOTHING,
    ]
