"""Records of ``normkit bench`` -> answer, tables, plot and page; every number is one of the records'."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from normkit.report import bench_blocks, bench_memory, bench_synchronized, bench_watch, html, markdown
from normkit.report import numbers as n
from normkit.report.document import Block, Document, Figure, Items, Section, Table, Text
from normkit.vocabulary.record import read_lines, write_atomically

Record = dict[str, Any]
PARTS = {"step": "forward and backward", "forward": "forward"}
BASELINE, OURS, COPY = "torch", "normkit", "copy"
COLOURS = {BASELINE: 0, OURS: 1, "torch.compile": 2, "torch.compile, normkit": 3}
FILE = "bench.jsonl"
BUSY = "~"
"""In front of a number for which too few samples had the processor to themselves."""


def read(directory: Path) -> list[Record]:
    """The records of a run: the environment, then one per measurement."""
    return read_lines(directory / FILE)


def write(directory: Path) -> Path:
    """report.html and report.md beside the bench.jsonl of a directory; returns the page."""
    page = document(read(directory))
    write_atomically(directory / "report.md", markdown.render(page).encode())
    write_atomically(directory / "report.html", html.render(page).encode())
    return directory / "report.html"


def answer(records: Sequence[Record]) -> str:
    """The result in one sentence or two, forward and backward, for each kind of record there is."""
    told = []
    for kind, words, what in (("op", "torch's own layers", "cells"), ("model", "the plain model", "models")):
        ours = [r for r in _measured(records, kind) if r["implementation"] == OURS and _ratio(r) is not None]
        if not ours:
            continue
        allocator = "default" if any(r.get("allocator") == "default" for r in ours) else ours[0].get("allocator")
        ratios = [_ratio(r) for r in ours if r.get("allocator") == allocator]
        values = [value for value in ratios if value is not None]
        mean = math.exp(statistics.fmean(map(math.log, values)))
        told.append(
            f"normkit is {n.factor(mean)}× as fast as {words} (geometric mean over {len(values)} {what}, forward and "
            f"backward, {allocator} allocator; from {n.factor(min(values))}× to {n.factor(max(values))}×)"
        )
    told += _overhead_answer(records) + bench_memory.answer(records) + bench_synchronized.answer(records)
    told += bench_watch.answer(records) + bench_blocks.answer(records)
    red = [r for r in records if r.get("state") in ("refused", "failed")]
    if red:
        told.append(f"{len(red)} measurements have no number because parity is red or the process died")
    busy = sum(r.get("quiet") is False for r in records)
    if busy:
        told.append(f"{busy} were taken on a busy machine and are marked {BUSY}")
    timed = sum(r.get("state") == "measured" and "quiet" in r for r in records)
    if 2 * busy > timed:
        told.insert(0, "no evidence, the machine was busy")
    return "; ".join(told) or "nothing could be timed"


def _overhead_answer(records: Sequence[Record]) -> list[str]:
    ours = [r for r in _measured(records, "overhead") if r["implementation"] == OURS and "extra_us" in r["step"]]
    tiny = [r["forward"]["extra_us"]["value"] for r in ours if r["reason"] == "tiny"]
    large = [100 / ratio - 100 for r in ours if r["reason"] != "tiny" and (ratio := _ratio(r))]
    told = []
    if tiny:
        told.append(f"a normkit layer costs {_signed(min(tiny))} to {_signed(max(tiny))} µs per call on a tiny tensor")
    if large:
        told.append(f"{_percent(min(large))} to {_percent(max(large))} on 1 MB and 4 MB, forward and backward")
    return [", ".join(told) + ", compared with torch's"] if told else []


def tables(records: Sequence[Record]) -> list[Table]:
    """The tables of the answer: per allocator, what each peer takes."""
    found = []
    for allocator in dict.fromkeys(r["allocator"] for r in records if "allocator" in r):
        own = [r for r in records if r.get("allocator") == allocator]
        for part, words in PARTS.items():
            found += [_ratios(own, part, f"{words}, {allocator} allocator", kind) for kind in ("op", "model", "memory")]
        found.append(bench_memory.table(own, f"kept between forward and backward, {allocator} allocator"))
        found.append(_overhead(own, f"extra time per call over torch's layer, {allocator} allocator"))
        found += [bench_synchronized.table(own, BUSY), bench_watch.table(own, BUSY)]
        found.append(bench_blocks.table(own, f"recurrent and Transformer layers, {allocator} allocator", BUSY))
    return [table for table in found if table.rows]


def document(records: Sequence[Record]) -> Document:
    """The whole page."""
    environment = next((r for r in records if r.get("kind") == "environment"), {})
    sections = [
        Section("answer", "Answer", [Text(answer(records), "answer"), *_picture(records)]),
        Section("tables", "Tables", [Text(HOW_TO_READ, "note"), *tables(records)]),
        Section("missing", "What has no number", _missing(records)),
        Section("all", "Every measurement", [_everything(records)]),
        Section("environment", "Environment", [_environment(environment)]),
    ]
    command = environment.get("command", "normkit bench")
    footer = f"Made by `{command}` from bench.jsonl beside this page, which holds the same numbers, unrounded."
    return Document("Normalization layers, timed", HEAD, sections, COLOURS, footer)


HEAD = "Milliseconds are medians; a ratio is the median over rounds of torch's time divided by the peer's."
HOW_TO_READ = (
    "Ratios are against torch's own layer followed by in-place addition and in-place ReLU, paired round by round, in "
    f"brackets 95 % bootstrap intervals over rounds. One pass is half of a measured copy of the same tensor. {BUSY} "
    "marks cells for which the machine was busy: fewer than four rounds had the processor to themselves. ‘red’ means "
    "that the result was wrong and is not timed."
)


def _ratios(records: Sequence[Record], part: str, caption: str, kind: str) -> Table:
    """One row per cell: torch's milliseconds and passes, then the ratio of every other peer."""
    own = [r for r in records if r.get("kind") == kind]
    others = [
        name
        for name in dict.fromkeys(r["implementation"] for r in own)
        if name not in (BASELINE, COPY) and any(part in r for r in own if r["implementation"] == name)
    ]
    header = ["op", "shape", "type", "layout", "torch, ms", *(["passes", "floor"] if kind == "op" else []), *others]
    rows = []
    for cell in _cells(own):
        by_name = {r["implementation"]: r for r in cell}
        torchs = by_name.get(BASELINE, {})
        if not any(part in r for r in cell):
            continue
        row = [*_where(cell[0]), _milliseconds(torchs, part)]
        if kind == "op":
            floor = cell[0].get("floor_passes", {}).get(part)
            row += [n.significant(torchs.get(part, {}).get("passes"), 2), n.count(floor)]
        rows.append([*row, *(_speedup(by_name.get(name), part) for name in others)])
    return Table(header, rows, caption, frozenset(range(4, len(header))))


def _overhead(records: Sequence[Record], caption: str) -> Table:
    header = ["layer", "tensor", "implementation", "forward", "in percent", "forward and backward", "in percent"]
    rows = []
    for r in _measured(records, "overhead"):
        if r["implementation"] in (BASELINE, COPY) or "extra_us" not in r["forward"]:
            continue
        row = [r["op"], f"{r['reason']}, {_shape(r)}", _who(r)]
        for part in ("forward", "step"):
            ratio = r[part]["speedup"]["value"]
            row += [_busy(r) + _microseconds(r[part]["extra_us"]), _percent(100 / ratio - 100)]
        rows.append(row)
    return Table(header, rows, caption, frozenset(range(3, len(header))))


def _everything(records: Sequence[Record]) -> Table:
    header = ["op", "shape", "type", "layout", "implementation", "allocator", "forward, ms", "forward and backward, ms"]
    header += ["page faults", "peak, MB", "rounds", "preempted", "parity error / limit"]
    rows = []
    for r in records:
        if r.get("state") != "measured" or "forward" not in r:
            continue
        row = [*_where(r), _who(r), r.get("allocator", ""), _spread(r, "forward"), _spread(r, "step")]
        row += [f"{r['faults']:.0f}", n.NOTHING if r.get("peak_mb") is None else f"{r['peak_mb']:.1f}"]
        rows.append([*row, str(r["rounds"]), str(r["preempted"]), _worst(r)])
    return Table(header, rows, "", frozenset(range(6, 12)))


def _missing(records: Sequence[Record]) -> list[Block]:
    told: dict[str, None] = {}
    for r in records:
        if r.get("state") in ("skipped", "refused", "failed"):
            told[f"{' '.join(filter(None, _where(r)))}, {r['implementation']}: {r['state']}: {r['why']}"] = None
        elif "remark" in r:
            told[f"{' '.join(filter(None, _where(r)))}, {r['implementation']}: {r['remark']}"] = None
    return [Items(list(told))] if told else [Text("Every implementation has been measured everywhere.", "note")]


def _environment(environment: Record) -> Table:
    hidden = ("kind", "schema")
    rows = [[k, v if isinstance(v, str) else json.dumps(v)] for k, v in environment.items() if k not in hidden]
    return Table(["what", "value"], rows)


def _picture(records: Sequence[Record]) -> list[Block]:
    """One row per op, type and layout; a small dot per shape, a large one for their geometric mean."""
    if not _drawable(records):
        return []
    try:
        from normkit.report.plots.speeds import draw
    except ModuleNotFoundError:  # the benchmark needs no plotting library, so the page does without one too
        return [Text('No plot: matplotlib is not installed; type: pip install "normkit[lab]"', "note")]
    canvas, told = draw(_drawable(records))
    title = "How many times as fast as torch's own layers"
    alternative = f"{title}, geometric mean over shapes. {'; '.join(told)}."
    return [Figure(canvas.svg("bench", title, alternative), title, alternative, wide=True)]


def _drawable(records: Sequence[Record]) -> dict[str, dict[str, list[float]]]:
    """Row -> implementation -> the speed-up on every shape."""
    own = [r for r in _measured(records, "op") if r["implementation"] in (OURS, "torch.compile")]
    allocators = [r.get("allocator") for r in own]
    shown = "default" if "default" in allocators else next(iter(allocators), None)
    rows: dict[str, dict[str, list[float]]] = {}
    for r in own:
        ratio = _ratio(r)
        if r.get("allocator") == shown and ratio:
            rows.setdefault(_row(r), {}).setdefault(r["implementation"], []).append(ratio)
    return rows


def picture(directory: Path, path: Path) -> Path:
    """The plot of the page as a file by itself, .svg or .png; raises ValueError where nothing was measured."""
    from normkit.report.plots.speeds import draw

    rows = _drawable(read(directory))
    if not rows:
        raise ValueError(f"{directory}: no layer has a ratio to torch's there, so there is nothing to draw")
    return draw(rows)[0].file(path)


def _row(r: Record) -> str:
    layout = " channels last" if r["layout"] == "channels_last" else ""
    return f"{r['op']}, {r['dtype']}{layout}"


def _measured(records: Iterable[Record], kind: str) -> list[Record]:
    return [r for r in records if r.get("kind") == kind and r.get("state") == "measured" and "step" in r]


def _cells(records: Iterable[Record]) -> list[list[Record]]:
    """Records of the same case, type and layout, in order of appearance."""
    cells: dict[tuple[str, ...], list[Record]] = {}
    for r in records:
        cells.setdefault(tuple(_where(r)), []).append(r)
    return list(cells.values())


def _where(r: Record) -> list[str]:
    return [r["op"], _shape(r), r["dtype"], r.get("layout", "").replace("_", " ")]


def _shape(r: Record) -> str:
    return "x".join(map(str, r.get("shape", [])))


def _ratio(r: Record) -> float | None:
    return r["step"].get("speedup", {}).get("value")


def _busy(r: Record) -> str:
    return "" if r.get("quiet", True) else BUSY


def _milliseconds(r: Record, part: str) -> str:
    return _busy(r) + n.significant(r[part]["ms"]) if part in r else n.NOTHING


def _spread(r: Record, part: str) -> str:
    """ "1.23 (1.20 to 1.31)": median and quartiles."""
    if part not in r:
        return n.NOTHING
    low, high = (n.significant(r[part][end]) for end in ("low_ms", "high_ms"))
    return f"{_milliseconds(r, part)} ({low} to {high})"


def _speedup(r: Record | None, part: str) -> str:
    if r is None or r["state"] == "skipped":
        return n.NOTHING
    if r["state"] != "measured":
        return "red" if r["state"] == "refused" else "died"
    ratio = r[part].get("speedup", {})
    return f"{_busy(r)}{n.factor(ratio.get('value'))}× {n.factor_interval(ratio.get('low'), ratio.get('high'))}".strip()


def _microseconds(extra: Record) -> str:
    ends = "" if extra["low"] is None else f" [{_signed(extra['low'])}, {_signed(extra['high'])}]"
    return f"{_signed(extra['value'])} µs{ends}"


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def _percent(value: float) -> str:
    return f"{_signed(value)} %"


def _who(r: Record) -> str:
    """The implementation, and which backend normkit has chosen."""
    chosen = r.get("backend") if r["implementation"] == OURS else None
    return f"{r['implementation']} ({chosen})" if chosen else r["implementation"]


def _worst(r: Record) -> str:
    pairs = [(a["error"], a["limit"]) for a in r.get("parity", {}).values()]
    if not pairs:
        return n.NOTHING
    error, limit = max(pairs, key=lambda pair: pair[0] / pair[1] if pair[1] else 0)
    return f"{error:.1e} / {limit:.1e}"
