"""Records of Transformers (text, digits-vit) -> the tables and the answers of docs/recurrent-and-attention.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from normkit.report import numbers as n
from normkit.report import table as tables
from normkit.report.document import Table
from normkit.report.labels import label, sentence

LAYER, NAIVE = "layer", "batch"
"""The two arms that all others are held against."""
MENDS = ("batch+ffn", "power", "rep", "progressive")
"""What is said to make batch statistics work in a Transformer, by the beginning of its arms' names."""
Arm = Mapping[str, Any]
Gaps = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""By the arm held against, then by arm: the paired difference of the test metric."""


def results(summary: Mapping[str, Any], gaps: Gaps) -> Table:
    """Every arm: the test metric, the difference to layer norm, what arrives and what diverges, final and searched."""
    about = summary["experiment"]["metric"]
    header = ["", "rate", f"test {about['name']}", "difference", "reach target", "diverge"]
    header += [f"in the search: {word}" for word in header[-2:]]
    rows = []
    for arm in _arms(summary):
        gap = gaps.get(LAYER, {}).get(arm["name"])
        rows.append(
            [
                f"`{arm['name']}`",
                n.rate(arm["lr"]),
                n.metric_interval(arm["test"], about),
                n.NOTHING if gap is None else n.difference(dict(gap), about),
                f"{arm['runs']['reached']} of {arm['runs']['finished']}",
                f"{arm['runs']['diverged']} of {arm['runs']['finished']}",
                _of_the_search(arm, "reached"),
                _of_the_search(arm, "diverged"),
            ]
        )
    return Table(header, rows, numeric=frozenset(range(1, len(header))))


def rates(summary: Mapping[str, Any]) -> Table:
    """The widest range of learning rates of every arm, and of the same arm with a norm on queries and keys below it."""
    header = ["", "usable rates", "stable rates"]
    rows = [
        [f"`{arm['name']}`", n.decades(arm["usable_rates"]), n.decades(arm["stable_rates"])]
        for arm in sorted(_arms(summary), key=lambda arm: _place(summary, arm))
    ]
    return Table(header, rows, numeric=frozenset(range(1, len(header))))


def folding(summary: Mapping[str, Any]) -> Table:
    """Milliseconds of a batch: a training step, evaluation, evaluation with the norms folded; and the error of that."""
    columns = (tables.MS, *tables.folding_columns(dict(summary)))
    rows = [[f"`{arm['name']}`", *(column.cell(dict(arm), {}) for column in columns)] for arm in _arms(summary)]
    header = ["", "ms per training step", *(column.header for column in columns[1:])]
    return Table(header, rows, numeric=frozenset(range(1, len(header))))


def answers(summary: Mapping[str, Any], gaps: Gaps) -> list[str]:
    """The questions of the page, each with the numbers of this record, whatever they say."""
    return [
        sentence(text) for text in (*_crash(summary), *_mended(summary, gaps), *_ranges(summary), *_folded(summary))
    ]


def _crash(summary: Mapping[str, Any]) -> Iterator[str]:
    arms = {arm["name"]: arm for arm in _arms(summary)}
    if not {LAYER, NAIVE} <= arms.keys():
        return
    naive, usual = arms[NAIVE], arms[LAYER]
    lost, finished = naive["runs"]["diverged"], naive["runs"]["finished"]
    verb = "crashes" if lost else "does not crash"
    ends = ("diverged", "reached")
    naive_ends, usual_ends = ([_of_the_search(arm, end) for end in ends] for arm in (naive, usual))
    yield (
        f"**Naive batch norm {verb}** at its best rate: {lost} of {finished} final runs diverge. Over all rates of the "
        f"search {naive_ends[0]} runs diverge and {naive_ends[1]} reach the target, with layer norm {usual_ends[0]} "
        f"and {usual_ends[1]}"
    )


def _mended(summary: Mapping[str, Any], gaps: Gaps) -> Iterator[str]:
    about = summary["experiment"]["metric"]
    for arm in _arms(summary):
        name = arm["name"]
        if not name.startswith(MENDS) or "+qk:" in name:
            continue
        against = [
            f"{_difference(gaps[other][name], about)} against {words}"
            for other, words in ((NAIVE, "naive batch norm"), (LAYER, "layer norm"))
            if name in gaps.get(other, {})
        ]
        runs = arm["runs"]
        yield (
            f"**{sentence(label(name)).rstrip('.')}**: {runs['diverged']} of {runs['finished']} final runs and "
            f"{_of_the_search(arm, 'diverged')} runs of the search diverge, {_of_the_search(arm, 'reached')} reach the "
            f"target; test {about['name']} {' and '.join(against)}"
        )


def _ranges(summary: Mapping[str, Any]) -> Iterator[str]:
    arms = {arm["name"]: arm for arm in _arms(summary)}
    for name, arm in arms.items():
        plain = arms.get(_without_qk(name))
        if plain is None or plain is arm:
            continue
        change = _width(arm["usable_rates"]) - _width(plain["usable_rates"])
        words = "widens" if change > 0 else "narrows" if change < 0 else "does not change"
        yield (
            f"**Of `{name}` the norm on queries and keys {words}** the range of usable rates: "
            f"{n.decades(plain['usable_rates'])} without it, {n.decades(arm['usable_rates'])} with it; stable rates: "
            f"{n.decades(plain['stable_rates'])} and {n.decades(arm['stable_rates'])}"
        )


def _folded(summary: Mapping[str, Any]) -> Iterator[str]:
    layer = next((arm for arm in _arms(summary) if arm["name"] == LAYER and arm.get("folding")), None)
    for arm in _arms(summary):
        found = arm.get("folding") or {}
        if found.get("times_as_fast") is None:
            continue
        name = sentence(label(arm["name"])).rstrip(".")
        beside = f"; layer norm takes {n.significant(layer['folding']['evaluation_ms'])} ms" if layer else ""
        yield (
            f"**{name}** takes {n.significant(found['evaluation_ms'])} ms for a batch in evaluation and "
            f"{n.significant(found['folded_ms'])} ms folded, {n.factor(found['times_as_fast'])} times as fast, with an "
            f"error of {found['error']:.0e}{beside}"
        )


def _arms(summary: Mapping[str, Any]) -> list[Arm]:
    return list(summary["points"][0]["arms"])


def _of_the_search(arm: Arm, end: str) -> str:
    """How many runs of the search come to this end, over all rates: every arm has the same."""
    return f"{sum(row[end] for row in arm['search'])} of {sum(row['seeds'] for row in arm['search'])}"


def _difference(gap: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    return f"{n.difference(dict(gap), dict(about))} ({gap['verdict']})"


def _without_qk(name: str) -> str:
    return "+".join(part for part in name.split("+") if not part.startswith("qk:"))


def _place(summary: Mapping[str, Any], arm: Arm) -> tuple[int, bool]:
    """Behind the same arm without a norm on queries and keys."""
    names = [other["name"] for other in _arms(summary)]
    plain = _without_qk(arm["name"])
    return (names.index(plain) if plain in names else len(names), plain != arm["name"])


def _width(stretch: Mapping[str, Any] | None) -> float:
    return -1.0 if stretch is None else round(stretch["decades"], 6)
