"""The digest of sweeps over the batch size -> the tables of docs/small-batches.md."""

from __future__ import annotations

from typing import Any

from normkit.report import numbers as n
from normkit.report.document import Table

Digest = dict[str, Any]
FRACTION = {"unit": "fraction", "name": "accuracy"}
PLAIN = "batch"
VERDICTS = {
    "better": "better than batch norm with running statistics",
    "worse": "worse",
    "not distinguishable": "not distinguishable",
    "no pairs": "without a result",
}


def sentences(digest: Digest, record: str) -> list[str]:
    """One sentence per size: what is better than batch norm there, what is worse, what cannot be told apart."""
    return [_sentence(digest, size) for size in _sizes(digest, record)]


def _sentence(digest: Digest, size: dict[str, Any]) -> str:
    gaps = {name: arm["against_plain"] for name, arm in size["arms"].items() if name != PLAIN}
    exact = size["arms"][PLAIN]["exact"]
    said = {digest["arms"][name]["words"]: gap for name, gap in gaps.items()}
    said |= {"batch norm with exact statistics": exact["difference"]} if exact else {}
    clauses = []
    for verdict in ("better", "worse", "not distinguishable", "no pairs"):
        found = [_clause(words, gap) for words, gap in said.items() if gap["verdict"] == verdict]
        clauses += [f"{VERDICTS[verdict]}: {', '.join(found)}"] if found else []
    return f"**{size['batch_size']}**: {'; '.join(clauses)}."


def _clause(words: str, gap: dict[str, Any]) -> str:
    return words if gap["value"] is None else f"{words} ({n.difference(gap, FRACTION)})"


def accuracy(digest: Digest, record: str) -> Table:
    """Test accuracy of batch norm, and the difference of every other arm to it."""
    names = _names(digest, record)
    header = ["batch size", digest["arms"][PLAIN]["words"], *(_head(digest, name) for name in names if name != PLAIN)]
    rows = []
    for size in _sizes(digest, record):
        arms = size["arms"]
        gaps = [n.difference(arms[name]["against_plain"], FRACTION) for name in names if name != PLAIN]
        rows.append([str(size["batch_size"]), n.metric_interval(arms[PLAIN]["test"], FRACTION), *gaps])
    return _table(header, rows)


def at_test(digest: Digest, record: str) -> Table:
    """With exact statistics and with those of the test batch: the difference to running statistics, same weights."""
    names = [name for name in _names(digest, record) if any(s["arms"][name]["exact"] for s in _sizes(digest, record))]
    header = ["batch size", *(f"{_head(digest, name)}: {of}" for name in names for of in ("exact", "test batch"))]
    rows = []
    for size in _sizes(digest, record):
        found = [size["arms"][name][key] for name in names for key in ("exact", "by_batch")]
        cells = [n.difference(one["difference"], FRACTION) if one else n.NOTHING for one in found]
        rows.append([str(size["batch_size"]), *cells])
    return _table(header, rows)


def race(digest: Digest, record: str) -> Table:
    """Median steps to the target, the rate, and processor time per step."""
    names = _names(digest, record)
    header = ["batch size", *(_head(digest, name) for name in names)]
    rows = []
    for size in _sizes(digest, record):
        cells = [_race(size["arms"][name]) for name in names]
        rows.append([str(size["batch_size"]), *cells])
    return _table(header, rows)


def cost(digest: Digest, record: str) -> Table:
    """Processor milliseconds per step, and greatest memory of the process."""
    names = _names(digest, record)
    header = ["batch size", *(_head(digest, name) for name in names)]
    rows = [
        [str(size["batch_size"]), *(_cost(size["arms"][name]) for name in names)] for size in _sizes(digest, record)
    ]
    return _table(header, rows)


def _race(arm: dict[str, Any]) -> str:
    reached, of = arm["reached"]
    steps = n.count(arm["steps_to_target"]) if arm["steps_to_target"] is not None else n.NOTHING
    return f"{steps} ({reached} of {of}), rate {n.rate(arm['lr'])}"


def _cost(arm: dict[str, Any]) -> str:
    memory = n.NOTHING if arm["memory_mb"] is None else f"{arm['memory_mb']:.0f} MB"
    return f"{n.significant(arm['cpu_ms'])} ms, {memory}"


def _names(digest: Digest, record: str) -> list[str]:
    first = next(size for size in digest["sizes"] if size["record"] == record)
    return list(first["arms"])


def _sizes(digest: Digest, record: str) -> list[dict[str, Any]]:
    return [size for size in digest["sizes"] if size["record"] == record]


def _head(digest: Digest, name: str) -> str:
    words: str = digest["arms"][name]["words"]
    return words


def _table(header: list[str], rows: list[list[str]]) -> Table:
    return Table(header, rows, numeric=frozenset(range(1, len(header))))
