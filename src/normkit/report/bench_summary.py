"""Several runs of ``normkit bench`` -> one small table: how many times as fast as torch, by op, type and layout."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from normkit.report import numbers as n
from normkit.report.document import Table

Record = dict[str, Any]
Cell = tuple[str, str, str, tuple[int, ...]]
COLUMNS = (
    ("float32", "contiguous"),
    ("float32", "channels_last"),
    ("bfloat16", "contiguous"),
    ("bfloat16", "channels_last"),
)

LARGE = 4.0
"""Megabytes from which a tensor's time is that of moving it."""


def table(runs: Sequence[Sequence[Record]], allocator: str, *, against: str = "torch", caption: str = "") -> Table:
    """One row per op; in each cell the geometric mean over shapes, and the least and greatest shape.

    Args:
        runs: the records of each run. Of a shape that several runs measured, the median counts.
        allocator: ``default`` or ``pinned``.
        against: ``torch``, or another implementation that was timed in the same rounds.
        caption: of the table.
    """
    cells = speedups(runs, allocator, against)
    ops = list(dict.fromkeys(op for op, _, _, _ in cells))
    rows = []
    for op in ops:
        row = [op]
        for dtype, layout in COLUMNS:
            values = [value for (o, d, where, _), value in cells.items() if (o, d, where) == (op, dtype, layout)]
            row.append(cell(values))
        rows.append(row)
    header = ["op", *(f"{dtype}, {layout.replace('_', ' ')}" for dtype, layout in COLUMNS)]
    return Table(header, rows, caption, frozenset(range(1, 1 + len(COLUMNS))))


def speedups(runs: Sequence[Iterable[Record]], allocator: str, against: str = "torch") -> dict[Cell, float]:
    """By op, type, layout and shape: the median over the runs of how many times normkit is as fast, both passes."""
    return {cell: statistics.median(values) for cell, values in _by_cell(runs, allocator, against).items()}


def newest(runs: Sequence[Sequence[Record]]) -> list[list[Record]]:
    """The runs without what another commit has measured again since: op, shape, type, layout and allocator together."""
    last: dict[tuple[Any, ...], str] = {}
    for run in sorted(runs, key=lambda run: run[0]["created"]):
        last |= {_measurement(r): run[0]["commit"] for r in run if r.get("kind") == "op"}
    return [[r for r in run if r.get("kind") != "op" or last[_measurement(r)] == run[0]["commit"]] for run in runs]


def _measurement(r: Record) -> tuple[Any, ...]:
    return r["op"], *r["shape"], r["dtype"], r["layout"], r["allocator"]


def repeats(runs: Sequence[Iterable[Record]], allocator: str, against: str = "torch") -> int:
    """How many runs measured each cell, at least; 0 without any."""
    return min((len(values) for values in _by_cell(runs, allocator, against).values()), default=0)


def _by_cell(runs: Sequence[Iterable[Record]], allocator: str, against: str) -> dict[Cell, list[float]]:
    found: dict[Cell, list[float]] = {}
    for records in runs:
        own: dict[Cell, dict[str, float]] = {}
        for r in records:
            if r.get("kind") != "op" or r.get("state") != "measured" or r.get("allocator") != allocator:
                continue
            cell = (r["op"], r["dtype"], r["layout"], tuple(r["shape"]))
            ratio = 1.0 if r["implementation"] == "torch" else (r.get("step") or {}).get("speedup", {}).get("value")
            if ratio:
                own.setdefault(cell, {})[r["implementation"]] = ratio
        for cell, ratios in own.items():
            if "normkit" in ratios and against in ratios:
                found.setdefault(cell, []).append(ratios["normkit"] / ratios[against])
    return found


def passes(runs: Sequence[Sequence[Record]], allocator: str, *, caption: str = "") -> Table:
    """Memory passes beside the floor: one row per op, float32 and contiguous, tensors of ``LARGE`` megabytes and more.

    One pass is half the time of a copy of the same tensor in the same rounds. Medians over shapes and runs.
    """
    found: dict[str, dict[str, list[float]]] = {}
    floors: dict[str, dict[str, int]] = {}
    for r in (r for records in runs for r in records):
        large = r.get("kind") == "op" and r.get("tensor_mb", 0) >= LARGE and r.get("state") == "measured"
        if not large or r["allocator"] != allocator or (r["dtype"], r["layout"]) != COLUMNS[0]:
            continue
        floors[r["op"]] = r["floor_passes"]
        for part in ("forward", "step"):
            value = (r.get(part) or {}).get("passes")
            if value and r["implementation"] in ("torch", "normkit"):
                found.setdefault(r["op"], {}).setdefault(f"{r['implementation']} {part}", []).append(value)
    header = ["op", "floor, forward", "torch", "normkit", "floor, forward and backward", "torch", "normkit"]
    rows = []
    for op, by in found.items():
        row = [op]
        for part in ("forward", "step"):
            measured = [by.get(f"{name} {part}", []) for name in ("torch", "normkit")]
            row.append(n.count(floors[op][part]))
            row += [n.significant(statistics.median(values), 2) if values else n.NOTHING for values in measured]
        rows.append(row)
    return Table(header, rows, caption, frozenset(range(1, len(header))))


def models(runs: Iterable[Sequence[Record]], allocator: str, busy: str) -> Table:
    """Training steps of whole models: milliseconds as they are, and how many times as fast each variant is.

    Medians over the runs. ``busy`` stands before what was measured on a busy machine, in one run at least.
    """
    found: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    loud: dict[tuple[str, str, str], bool] = {}
    for r in (r for run in runs for r in run):
        if r.get("kind") != "model" or r.get("state") != "measured" or r["allocator"] != allocator:
            continue
        key, step = (r["op"], r["dtype"], r["layout"]), r["step"]
        own = found.setdefault(key, {})
        value = step["ms"] if r["implementation"] == "torch" else step["speedup"]["value"]
        own.setdefault(r["implementation"], []).append(value)
        loud[key] = loud.get(key, False) or r.get("quiet") is False
    titles = {
        "normkit": "`accelerate_`",
        "torch.compile": "torch.compile",
        "torch.compile, normkit": 'backend="normkit"',
        "no norms": "without norms",
    }
    variants = [variant for variant in titles if any(variant in own for own in found.values())]
    rows = []
    for (model, dtype, layout), own in found.items():
        mark = busy if loud[model, dtype, layout] else ""
        cells = [f"{mark}{n.factor(statistics.median(own[v]))}×" if v in own else n.NOTHING for v in variants]
        ms = f"{mark}{n.significant(statistics.median(own['torch']), 3)}"
        rows.append([model, dtype, layout.replace("_", " "), ms, *cells])
    header = ["model", "type", "layout", "torch, ms", *(titles[variant] for variant in variants)]
    return Table(header, rows, "", frozenset(range(3, len(header))))


def cell(values: Sequence[float]) -> str:
    if not values:
        return n.NOTHING
    mean = math.exp(statistics.fmean(map(math.log, values)))
    if len(values) == 1:
        return f"{n.factor(mean)}×"
    return f"{n.factor(mean)}× ({n.factor(min(values))} to {n.factor(max(values))})"
