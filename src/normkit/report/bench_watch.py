"""``normkit bench --op watch`` on the page: what watching a training costs, between samples and at one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from normkit.report import numbers as n
from normkit.report.document import Table

Record = dict[str, Any]
BASELINE = "torch"


def answer(records: Sequence[Record]) -> list[str]:
    """The share of the training time, for the models together."""
    costs = [r["watch"] for r in _own(records) if "watch" in r]
    if not costs:
        return []
    shares, intervals = [c["share"] for c in costs], [c["interval"] for c in costs]
    apart = f"{min(intervals)}" if min(intervals) == max(intervals) else f"{min(intervals)} to {max(intervals)}"
    least, most = n.share(min(shares)), n.share(max(shares))
    share = least if least == most else f"{least} to {most}"
    return [f"watching a training takes {share} of its time, with samples {apart} steps apart, and changes no bit"]


def table(records: Sequence[Record], busy: str) -> Table:
    """One row per model, type, allocator (`nk.tune_allocator`: pinned) and variant."""
    header = ["model", "type", "allocator", "step", "ms", "more, ms", "peak, MB", "samples apart", "of the time"]
    rows = []
    plain: dict[tuple[str, ...], float] = {}
    for r in _own(records):
        key, mark = (r["op"], r["dtype"], r.get("allocator", "default")), "" if r.get("quiet", True) else busy
        milliseconds = r["step"]["ms"]
        if r["implementation"] == BASELINE:
            plain[key] = milliseconds
        more = n.NOTHING if r["implementation"] == BASELINE else f"{milliseconds - plain[key]:+.2f}".replace("-", "−")
        cost, peak = r.get("watch"), r.get("peak_mb")
        rows.append(
            [
                *key,
                WORDS.get(r["implementation"], r["implementation"]),
                mark + n.significant(milliseconds),
                mark + more,
                n.NOTHING if peak is None else f"{peak:.0f}",
                str(cost["interval"]) if cost else n.NOTHING,
                n.share(cost["share"]) if cost else n.NOTHING,
            ]
        )
    return Table(header, rows, "a watched training step, forward to optimizer", frozenset(range(4, len(header))))


WORDS = {"torch": "not watched", "normkit": "watched, between samples", "normkit, sampled step": "watched, sampled"}


def _own(records: Sequence[Record]) -> list[Record]:
    return [r for r in records if r.get("kind") == "watch" and r.get("state") == "measured" and "step" in r]
