"""From which size on the CPU kernels take less time than torch's operators, and which of them dispatch takes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from normkit.report import numbers as n
from normkit.report.document import Table

Record = dict[str, Any]
Ratios = list[tuple[float, bool]]
"""Of each run: how many times as fast the kernel is, and whether dispatch took it."""


def table(runs: Sequence[Iterable[Record]], allocator: str = "pinned") -> Table:
    """One row per op, type, layout and width of rows; one column per number of elements.

    In a cell: how many times as fast the kernel is as torch's operators in the same layer and the same rounds, forward
    and backward; the median over the runs. In italics where dispatch takes torch's operators.
    """
    found: dict[tuple[str, ...], dict[int, Ratios]] = {}
    for run in runs:
        for (*row, elements), ratio, chosen in _compared(run, allocator):
            found.setdefault(tuple(row), {}).setdefault(elements, []).append((ratio, chosen))
    sizes = sorted({elements for cells in found.values() for elements in cells})
    rows = [[*row, *(_cell(cells.get(size)) for size in sizes)] for row, cells in found.items()]
    header = ["op", "type", "layout", "rows of", *(_thousands(size) for size in sizes)]
    return Table(header, rows, "", frozenset(range(3, len(header))))


def _compared(run: Iterable[Record], allocator: str) -> Iterable[tuple[tuple[Any, ...], float, bool]]:
    """Each measurement that has both: what was measured, times as fast, whether dispatch took the kernel."""
    cells: dict[tuple[Any, ...], dict[str, tuple[float, bool]]] = {}
    for r in run:
        if r.get("kind") == "op" and r.get("state") == "measured" and r.get("allocator") == allocator:
            width = f"{r['shape'][-1]}" if len(r["shape"]) == 2 else n.NOTHING
            what = r["op"], r["dtype"], r["layout"].replace("_", " "), width, math.prod(r["shape"])
            if r.get("backend"):
                cells.setdefault(what, {})[r["backend"]] = r["step"]["ms"], r["implementation"] == "normkit"
    for what, by in cells.items():
        if {"native", "torch"} <= by.keys():
            yield what, by["torch"][0] / by["native"][0], by["native"][1]


def _cell(ratios: Ratios | None) -> str:
    if not ratios:
        return n.NOTHING
    text = f"{n.factor(statistics.median(ratio for ratio, _ in ratios))}×"
    return text if all(chosen for _, chosen in ratios) else f"*{text}*"


def _thousands(elements: int) -> str:
    return f"{elements / 1000:.0f} k" if elements < 10**6 else f"{elements / 10**6:.1f} M"
