"""``normkit bench --op memory`` on the page: what a chain keeps for its backward pass, against torch's layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from normkit.report.document import Table

Record = dict[str, Any]
BASELINE = "torch"


def answer(records: Sequence[Record]) -> list[str]:
    """One sentence with the share of every implementation; of several types the one with the least difference."""
    own = [r for r in records if "saved_mb" in r]
    torchs = {r["dtype"]: r["saved_mb"] for r in own if r["implementation"] == BASELINE}
    told = []
    for name in dict.fromkeys(r["implementation"] for r in own):
        more = [100 * r["saved_mb"] / torchs[r["dtype"]] - 100 for r in own if r["implementation"] == name]
        if name != BASELINE:
            told.append(f"{name} {min(more, key=abs):+.1f} %".replace("-", "−"))
    return [f"kept for the backward pass, compared with torch's layers in place: {', '.join(told)}"] if told else []


def table(records: Sequence[Record], caption: str) -> Table:
    """One row per implementation and type."""
    header = [
        "chain",
        "shape",
        "type",
        "implementation",
        "MB",
        "of torch's",
        "error of input's gradient",
        "parameters'",
    ]
    own = [r for r in records if "saved_mb" in r]
    torchs = {r["dtype"]: r["saved_mb"] for r in own if r["implementation"] == BASELINE}
    rows = []
    for r in own:
        share = f"{100 * r['saved_mb'] / torchs[r['dtype']]:.1f} %"
        errors = [f"{r['gradient_error'][name]:.1e}" for name in ("input", "parameters")]
        shape = "x".join(map(str, r["shape"]))
        rows.append([r["op"], shape, r["dtype"], r["implementation"], f"{r['saved_mb']:.2f}", share, *errors])
    return Table(header, rows, caption, frozenset(range(4, len(header))))
