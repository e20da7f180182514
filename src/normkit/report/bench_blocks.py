"""``normkit bench --op blocks`` on the page: recurrent and Transformer layers beside torch's, with their limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from normkit.report import numbers as n
from normkit.report.document import Table

Record = dict[str, Any]
BASELINE, OURS = "torch", "normkit"


def answer(records: Sequence[Record]) -> list[str]:
    """How many layers keep their limits and who does not; how normkit's and torch's compare in evaluation."""
    ours = [r for r in _own(records) if r["implementation"] == OURS]
    limited = [r for r in ours if r["limit"] is not None]
    told = []
    if limited:
        late = [f"{r['op']} takes {n.factor(_times(r))}× of {r['limit']:g}×" for r in limited if _times(r) > r["limit"]]
        kept = f"{len(limited) - len(late)} of {len(limited)} layers keep their limit of torch's time"
        told.append(": ".join([kept, *([", ".join(late)] if late else [])]))
    fast = {r["op"] for r in _own(records) if r["implementation"] == BASELINE and r["fast_path"]}
    for r in ours:
        if not r["training"]:
            whose = "torch's fast path" if r["op"] in fast else "torch's layer"
            told.append(f"{r['op']} takes {n.factor(_times(r))}× the time of {whose}")
    return told


def table(records: Sequence[Record], caption: str, busy: str) -> Table:
    """One row per implementation of a layer: milliseconds, how many times as long as torch's, and the limit."""
    header = ["layer", "norm", "mode", "implementation", "ms", "times torch's", "limit", "within"]
    rows = []
    for r in _own(records):
        mark, part = "" if r.get("quiet", True) else busy, r["step"]
        limit = r.get("limit")
        ratio = part.get("speedup")
        rows.append(
            [
                r["layer"],
                r["norm"],
                "training" if r["training"] else "evaluation",
                r["implementation"],
                mark + n.significant(part["ms"]),
                n.NOTHING if ratio is None else f"{mark}{n.factor(_times(r))}× {_ends(ratio)}".strip(),
                n.NOTHING if limit is None else f"{limit:g}×",
                n.NOTHING if limit is None else "yes" if _times(r) <= limit else "no",
            ]
        )
    return Table(header, rows, caption, frozenset({4, 5, 6}))


def _times(r: Record) -> float:
    """How many times as long as torch's: the median over rounds."""
    return 1 / float(r["step"]["speedup"]["value"])


def _ends(ratio: Record) -> str:
    if ratio["low"] is None:
        return ""
    return n.factor_interval(1 / ratio["high"], 1 / ratio["low"])


def _own(records: Sequence[Record]) -> list[Record]:
    return [r for r in records if r.get("kind") == "block" and r.get("state") == "measured" and "step" in r]
