"""What was found of every row, and whether it reaches its goal: the table at the end, and that of README.md."""

from __future__ import annotations

from typing import Any

from contenders import COMPILED, COMPILED_IN_GRAPHS, OURS, UNASKED
from rows import MODELS, ROWS, Goal

Record = dict[str, Any]
WIDTH = 70


def table(records: list[Record]) -> str:
    """One line per row, or per part of a step that has a goal of its own.

    Milliseconds of the device, fraction of the copy, times as fast as torch and torch.compile; ``x call``: times as
    fast as torch as a training loop meets it; then whether the goal is reached.
    """
    lines = [f"{'':<{WIDTH}}{'ms':>9}{'of copy':>9}{'x eager':>9}{'x compile':>10}{'x call':>8}  goal"]
    goals = {row.name: row.goals for row in ROWS}
    for title in dict.fromkeys(r.get("row") or r.get("model") for r in records if r["kind"] in ("timing", "model")):
        found = {
            r["implementation"]: r for r in records if title in (r.get("row"), r.get("model")) and "implementation" in r
        }
        mine = found.get(OURS, {})
        if mine.get("state") != "measured":
            lines.append(f"{title:<{WIDTH}}{mine.get('state', 'nothing')}: {mine.get('why', '')}"[:126].rstrip(": "))
            continue
        for goal in goals.get(title, ()) or (Goal(),):
            lines.append(_line(title, goal, found, mine))
        for own in (UNASKED, COMPILED, COMPILED_IN_GRAPHS):
            if found.get(own, {}).get("state") == "measured":
                lines.append(_line(title + own.removeprefix(OURS), Goal(), _beside(own, found), found[own]))
    checks_made = [r for r in records if r["kind"] == "parity"]
    red = [r for r in checks_made if r["state"] == "red"]
    lines.append(f"parity: {len(checks_made) - len(red)} of {len(checks_made)} green")
    lines += [f"  red: {r['row']} in {r['dtype']}: {r['why']}"[:200] for r in red[:5]]
    return "\n".join(lines)


def markdown(records: list[Record]) -> str:
    """The table of README.md: as :func:`table`, with what a row stands for and how long the others take."""
    lines = [
        "| row | what it stands for | ms | torch | compile | of copy | x eager | x compile | x call | goal |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for title, reason, goals, own in [
        *((row.name, row.case.reason, row.goals, OURS) for row in ROWS),
        *((name, "a training step, by `auto`", (), UNASKED) for name in MODELS),
        *((name, "a training step, all on the kernels", (), OURS) for name in MODELS),
        *((name, "a training step, compiled", (), COMPILED) for name in MODELS),
        *((name, "a training step, compiled, in CUDA graphs", (), COMPILED_IN_GRAPHS) for name in MODELS),
    ]:
        found = {r["implementation"]: r for r in records if title in (r.get("row"), r.get("model")) and _timed(r)}
        found, mine = _beside(own, found), found.get(own)
        for goal in goals or (Goal(),):
            name = title if goal.part == "step" else f"{title}, {goal.part}"
            if mine is None:
                lines.append(f"| {name} | {reason} |" + " |" * 7 + " not measured |")
                continue
            part = f"{goal.part}_ms"
            of_copy = mine["of_copy"][goal.part] if "of_copy" in mine else None
            eager, compiled = (_ratio(found, mine, other, part) for other in ("torch", "torch.compile"))
            times = [f"{r[part]:.3f}" if r else "" for r in (mine, found.get("torch"), found.get("torch.compile"))]
            call = _ratio(found, mine, "torch", "wall_ms")
            cells = [name, reason, *times, *(_cell(n) for n in (of_copy, eager, compiled, call))]
            verdict = f"{goal}: {_verdict(goal, of_copy, eager, compiled)}" if goals else "–"
            lines.append(f"| {' | '.join(cells)} | {verdict} |")
    return "\n".join(lines)


def _beside(own: str, found: dict[str, Record]) -> dict[str, Record]:
    """In CUDA graphs what ``torch.compile`` does in CUDA graphs counts."""
    if own != COMPILED_IN_GRAPHS:
        return found
    return {**found, "torch.compile": found.get("torch.compile, CUDA graphs", {})}


def _timed(record: Record) -> bool:
    return record.get("state") == "measured" and "implementation" in record


def _line(title: str, goal: Goal, found: dict[str, Record], mine: Record) -> str:
    part = f"{goal.part}_ms"
    of_copy = mine["of_copy"][goal.part] if "of_copy" in mine else None
    eager, compiled = (_ratio(found, mine, other, part) for other in ("torch", "torch.compile"))
    call = _ratio(found, mine, "torch", "wall_ms")
    cells = [_cell(number) for number in (of_copy, eager, compiled, call)]
    name = title if goal.part == "step" else f"{title}, {goal.part}"
    return (
        f"{name:<{WIDTH}}{mine[part]:>9.3f}{cells[0]:>9}{cells[1]:>9}{cells[2]:>10}{cells[3]:>8}"
        f"  {_verdict(goal, of_copy, eager, compiled)}"
    ).rstrip()


def _ratio(found: dict[str, Record], mine: Record, other: str, what: str) -> float | str | None:
    """How many times as fast; otherwise in a word why that is not known."""
    theirs = found.get(other, {})
    ratio: float | str | None = theirs[what] / mine[what] if theirs.get("state") == "measured" else theirs.get("state")
    return ratio


def _cell(number: float | str | None) -> str:
    return f"{number:.2f}" if isinstance(number, float) else (number or "")


def _verdict(goal: Goal, of_copy: Any, eager: Any, compiled: Any) -> str:
    """``reached``, or what is missed or not known; nothing where there is no goal."""
    wanted = {"copy": (goal.bandwidth, of_copy), "eager": (goal.eager, eager), "compile": (goal.compiled, compiled)}
    asked = {name: pair for name, pair in wanted.items() if pair[0] is not None}
    open_ = [name for name, (_, got) in asked.items() if not isinstance(got, float)]
    missed = [name for name, (least, got) in asked.items() if isinstance(got, float) and got < least]
    if missed:
        return f"missed: {', '.join(missed)}"
    if open_:
        return f"unknown: {', '.join(open_)}"
    return "reached" if asked else ""
