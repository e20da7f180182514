"""Records of ``normkit bench --op synchronized`` -> a sentence and a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from normkit.report import numbers as n
from normkit.report.document import Table

Record = dict[str, Any]
OURS = "normkit"
HEADER = ["shape per process", "processes", "bytes forward", "bytes backward", "not synchronised, ms"]
CAPTION = "synchronised batch norm, forward and backward of one layer in each process"


def answer(records: Sequence[Record]) -> list[str]:
    """The extra time of a step where there is communication."""
    extra = [r["step"]["extra_us"]["value"] / 1e3 for r in _ours(records) if r["processes"] > 1]
    if not extra:
        return []
    low, high = n.significant(min(extra)), n.significant(max(extra))
    return [f"synchronising a batch norm over 2 or 3 processes costs {low} to {high} ms per step and layer here"]


def table(records: Sequence[Record], busy: str) -> Table:
    """One row per shape and number of processes."""
    plain = {_key(r): r for r in _all(records) if r["implementation"] != OURS}
    rows = []
    for r in _ours(records):
        mark = "" if r["quiet"] else busy
        extra = r["step"]["extra_us"]
        ends = "" if extra["low"] is None else f" [{extra['low'] / 1e3:+.2f}, {extra['high'] / 1e3:+.2f}]"
        rows.append(
            [
                "x".join(map(str, r["shape"])),
                str(r["processes"]),
                f"{r['bytes']['forward']:,}",
                f"{r['bytes']['backward']:,}",
                mark + n.significant(plain[_key(r)]["step"]["ms"]),
                mark + n.significant(r["step"]["ms"]),
                f"{mark}{extra['value'] / 1e3:+.2f}{ends}",
            ]
        )
    header = [*HEADER, "synchronised, ms", "difference, ms"]
    return Table(header, rows, CAPTION, frozenset(range(1, len(header))))


def _all(records: Sequence[Record]) -> list[Record]:
    return [r for r in records if r.get("kind") == "synchronized" and r.get("state") == "measured"]


def _ours(records: Sequence[Record]) -> list[Record]:
    return [r for r in _all(records) if r["implementation"] == OURS]


def _key(r: Record) -> tuple:
    return (*r["shape"], r["processes"], r["dtype"])
