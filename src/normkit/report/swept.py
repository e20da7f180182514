"""A sweep -> tables by arm and value of the knob, for docs/what-works-where.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from normkit.report import numbers as n
from normkit.report.document import Table
from normkit.report.labels import label, sentence

HEADS = {"depth": "{} layers", "batch-size": "batches of {}", "share": "{:.0%} of the text"}
"""By the knob."""
Summary = Mapping[str, Any]


def outcome(summary: Summary) -> Table:
    """The test metric by arm and value, and how many of the runs reach the target or diverge."""
    metric = summary["experiment"]["metric"]
    return _table(summary, lambda arm: f"{n.metric_interval(arm['test'], metric)}{_finish(arm['runs'])}")


def differences(summary: Summary) -> Table:
    """The test metric of every other arm less that of the baseline, in pairs of runs, and the verdict."""
    metric, baseline = summary["experiment"]["metric"], summary["experiment"]["baseline"]

    def cell(arm: Mapping[str, Any]) -> str:
        if arm["name"] == baseline:
            return n.NOTHING
        found = arm["test_difference"]
        return f"{n.difference(found, metric)}: {found['verdict']}"

    return _table(summary, cell)


def gradients(summary: Summary) -> Table:
    """Gradient of the first weight over that of the last hidden one, at the first step."""
    return _table(summary, _growth)


def cost(summary: Summary) -> Table:
    """Processor milliseconds per step."""
    return _table(summary, lambda arm: n.significant(arm["cpu_ms_per_step"]))


def _table(summary: Summary, cell: Callable[[Mapping[str, Any]], str]) -> Table:
    points, head = summary["points"], HEADS[summary["experiment"]["sweep"]["knob"]]
    rows = []
    for place, arm in enumerate(points[0]["arms"]):
        name = sentence(label(arm["name"])).rstrip(".")
        rows.append([name, *(cell(point["arms"][place]) for point in points)])
    header = ["", *(head.format(point["knob"]) for point in points)]
    return Table(header, rows, numeric=frozenset(range(1, len(header))))


def _finish(runs: Mapping[str, Any]) -> str:
    diverged = f", {runs['diverged']} diverged" if runs["diverged"] else ""
    return f", {runs['reached']} of {runs['finished']}{diverged}"


def _growth(arm: Mapping[str, Any]) -> str:
    """The classifier behind the hidden layers has a gradient of its own kind, and is left out."""
    found = arm["gradient_norms"]
    norms = found and found["start"]["norms"][:-1]
    if not norms or None in (norms[0], norms[-1]) or not norms[-1]:
        return n.NOTHING
    return f"{norms[0] / norms[-1]:.2g}"
