"""What an experiment measured by itself (modes covered, collapsed ...), as columns and a section with the pictures."""

from __future__ import annotations

from typing import Any

from normkit.report import numbers as n
from normkit.report import table as tables
from normkit.report.document import Block, Section, Text
from normkit.report.figures import drawn
from normkit.report.labels import label, listing

Summary = dict[str, Any]
MEASURES_NOTE = (
    "Of what the generator makes of the test noise at the end of a run: means over the final runs, 95 % intervals."
)
PICTURES_NOTE = (
    "What the generator makes of the same noise after more and more steps, in the first final run of each arm."
)


def columns(summary: Summary) -> tuple[tables.Column, ...]:
    """One for every measure of the experiment, in its order; none where it has none."""
    names = dict.fromkeys(name for arm in _arms(summary) for name in arm.get("measures") or ())
    return tuple(tables.Column(name.replace("_", " "), _cell(name)) for name in names)


def _cell(name: str) -> Any:
    return lambda arm, _: written((arm.get("measures") or {}).get(name), name)


def written(found: dict[str, Any] | None, name: str = "") -> str:
    """A measure of all runs: "7.2 [6.8, 7.6]", "93 % [90, 95]" of a share, "2 of 10"."""
    if not found:
        return n.NOTHING
    if "true" in found:
        return f"{found['true']} of {found['of']}"
    if found["mean"] is None:
        return n.NOTHING
    if name.endswith("_share"):
        return n.metric_interval(found, {"unit": "fraction"})
    text = n.significant(found["mean"])
    if found["low"] is None:
        return text
    return f"{text} [{n.significant(found['low'])}, {n.significant(found['high'])}]"


def sections(summary: Summary) -> list[Section]:
    """Table and pictures; nothing where the experiment measured nothing by itself."""
    own = columns(summary)
    if not own:
        return []
    blocks: list[Block] = [Text(MEASURES_NOTE, "note"), tables.table(summary, (tables.TEST, *own))]
    if not summary["experiment"].get("sweep") and any(arm.get("pictures") for arm in _arms(summary)):
        blocks += [Text(PICTURES_NOTE, "note"), *drawn("samples.over_training", summary)]
    return [Section("generated", "What is generated", blocks)]


def collapse(summary: Summary) -> str:
    """Which arms collapse, in one sentence; "" where nothing was asked about it."""
    told = [(label(arm["name"]), (arm.get("measures") or {}).get("collapsed")) for arm in summary["points"][0]["arms"]]
    asked = [(name, found) for name, found in told if found]
    if not asked:
        return ""
    some = [f"{name} in {found['true']} of {found['of']}" for name, found in asked if found["true"]]
    never = [name for name, found in asked if not found["true"]]
    parts = [f"final runs that collapse: {'; '.join(some)}"] if some else []
    parts += [f"none with {listing(never)}" if some else "no final run collapses"] if never else []
    return "; ".join(parts)


def _arms(summary: Summary) -> list[dict[str, Any]]:
    return [arm for point in summary["points"] for arm in point["arms"]]
