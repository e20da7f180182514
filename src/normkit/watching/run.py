"""A run that was watched, read from its directory: a diagnosis, and its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from normkit.diagnosis import Diagnosis
from normkit.vocabulary.finding import Finding, worst_first
from normkit.vocabulary.prescription import Prescription
from normkit.vocabulary.reading import Reading
from normkit.watching.directory import read_about, read_readings, unit_of

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
    """The rules' findings over a run, and the first NaN where there was one."""
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
    found = Diagnosis.of_readings(
        [*structure, *readings], about["model"], lacking=about["lacking"], run=run, select=select, ignore=ignore
    )
    if run["first_nan"] is None:
        return found
    return replace(found, findings=worst_first([nan_finding(run["first_nan"]), *found.findings]))


def structure_of(about: Mapping[str, Any]) -> list[Reading]:
    """What stood in the model, as watch.json has it."""
    plain = lambda value: tuple(value) if isinstance(value, list) else value
    return [Reading(q, plain(value), module, None, unit_of(q)) for q, module, value in about.get("structure", ())]


def structure_rows(readings: Sequence[Reading]) -> list[list[Any]]:
    """The same as plain data."""
    return [[reading.quantity, reading.module, reading.value] for reading in readings]


def nan_finding(trace: Mapping[str, Any]) -> Finding:
    """The first NaN as a finding."""
    return Finding(
        "first_nan",
        "error",
        trace["verdict"],
        (trace["module"],) if trace["module"] else (),
        "gradient_nonfinite",
        step=trace["step"],
        prescriptions=(
            Prescription(
                "see which operation it is",
                trace["module"],
                "anomaly mode names the line of the forward pass whose gradient is not finite first.",
                "identical",
                by_hand="with torch.autograd.set_detect_anomaly(True):\n    loss_fn(model(x), y).backward()",
            ),
        ),
        check="the same run, watched again, has no first NaN",
    )
