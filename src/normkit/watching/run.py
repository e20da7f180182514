"""A run that was watched, read from its directory: a diagnosis, and its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from normkit.diagnosis import Diagnosis
from normkit.vocabulary.reading import Reading
from normkit.watching.directory import read_about, read_readings, unit_of
from normkit.watching.quantities import FIRST_NAN

Names = Sequence[str] | str | None


def report_of_run(directory: str | Path, *, select: Names = None, ignore: Names = None) -> Diagnosis:
    """What the rules say about a run that ``nk.watch`` has written down, finished or not.

    Args:
        directory: the ``out`` of the watch.
        select: names or patterns of rules; default all.
        ignore: names or patterns of rules that are not asked.

    Raises:
        ValueError: no watched run lies there.
    """
    path = Path(directory)
    about = read_about(path)
    readings, facts = read_readings(path)
    return diagnosis_of(about, structure_of(about), readings, facts, select=select, ignore=ignore)


def diagnosis_of(
    about: Mapping[str, Any],
    structure: Sequence[Reading],
    readings: Sequence[Reading],
    facts: Sequence[Mapping[str, Any]],
    *,
    select: Names = None,
    ignore: Names = None,
) -> Diagnosis:
    """The rules' findings over a run."""
    last = max([about, *facts[-1:]], key=lambda known: known["steps"])  # watch.json is behind while the run goes on
    run = {
        "name": about["name"],
        "steps": last["steps"],
        "samples": last["samples"],
        "overhead": last["overhead"],
        "processes": about["processes"],
        "device": about["device"],
        "notes": about.get("notes", []),
        "first_nan": about.get("first_nan"),
        "closed": about.get("closed", False),
    }
    first = [] if run["first_nan"] is None else [nan_reading(run["first_nan"])]
    return Diagnosis.of_readings(
        [*structure, *first, *readings], about["model"], lacking=about["lacking"], run=run, select=select, ignore=ignore
    )


def structure_of(about: Mapping[str, Any]) -> list[Reading]:
    """What stood in the model, as watch.json has it."""
    plain = lambda value: tuple(value) if isinstance(value, list) else value
    return [Reading(q, plain(value), module, None, unit_of(q)) for q, module, value in about.get("structure", ())]


def structure_rows(readings: Sequence[Reading]) -> list[list[Any]]:
    """The same as plain data."""
    return [[reading.quantity, reading.module, reading.value] for reading in readings]


def nan_reading(trace: Mapping[str, Any]) -> Reading:
    """The first NaN as what the rules read: the verdict of its trace, at its place and its step."""
    return Reading(FIRST_NAN.name, trace["verdict"], trace["module"], trace["step"])
