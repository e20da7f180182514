"""The sweep over the depth -> the tables of docs/what-works-where.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from normkit.report import numbers as n
from normkit.report.document import Table
from normkit.report.labels import label, sentence

FRACTION = {"unit": "fraction", "name": "accuracy"}


def accuracy(summary: Mapping[str, Any]) -> Table:
    """Test accuracy by arm and depth, and how many of the runs reach the target or diverge."""
    return _table(summary, _accuracy)


def gradients(summary: Mapping[str, Any]) -> Table:
    """Gradient of the first weight over that of the last hidden one, at the first step."""
    return _table(summary, _growth)


def cost(summary: Mapping[str, Any]) -> Table:
    """Processor milliseconds per step."""
    return _table(summary, lambda arm: n.significant(arm["cpu_ms_per_step"]))


def _table(summary: Mapping[str, Any], cell: Any) -> Table:
    points = summary["points"]
    rows = []
    for place, arm in enumerate(points[0]["arms"]):
        name = sentence(label(arm["name"])).rstrip(".")
        rows.append([name, *(cell(point["arms"][place]) for point in points)])
    header = ["", *(f"{point['knob']} layers" for point in points)]
    return Table(header, rows, numeric=frozenset(range(1, len(header))))


def _accuracy(arm: Mapping[str, Any]) -> str:
    runs = arm["runs"]
    diverged = f", {runs['diverged']} diverged" if runs["diverged"] else ""
    return f"{n.metric_interval(arm['test'], FRACTION)}, {runs['reached']} of {runs['finished']}{diverged}"


def _growth(arm: Mapping[str, Any]) -> str:
    """The classifier behind the hidden layers has a gradient of its own kind, and is left out."""
    found = arm["gradient_norms"]
    norms = found and found["start"]["norms"][:-1]
    if not norms or None in (norms[0], norms[-1]) or not norms[-1]:
        return n.NOTHING
    return f"{norms[0] / norms[-1]:.2g}"
