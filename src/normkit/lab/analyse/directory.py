"""Which cells of a run directory belong to the experiment; a half-written directory is the usual case, no accident."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normkit.vocabulary.record import STATES, Record, read_cell, read_experiment

REQUIRED = ("arms", "baseline", "metric", "target", "steps", "seeds")
REQUIRED_OF_A_CELL = ("arm", "lr", "seed", "phase", "steps")


@dataclass(frozen=True)
class RunDirectory:
    """The experiment, its readable cells in the order of their names, and what could not be read, with the reason."""

    path: Path
    experiment: dict[str, Any]
    cells: list[Record]
    problems: list[dict[str, str]]


def read(directory: str | Path) -> RunDirectory:
    """Read a run directory (docs/run-directory.md).

    Raises ValueError when there is no experiment to speak of; the message names the file and what to do. A cell that
    cannot be read is left out and named in ``problems``; files that are no part of the format are ignored.
    """
    path = Path(directory)
    if not path.is_dir():
        raise ValueError(f"{path}: no such directory; give the directory that `normkit compare` printed")
    experiment = read_experiment(path)
    _check_experiment(experiment, path / "experiment.json")
    arms = {arm["name"] for arm in experiment["arms"]}
    cells: list[Record] = []
    problems: list[dict[str, str]] = []
    for folder in sorted(item for item in (path / "cells").glob("*") if item.is_dir()):
        if not (folder / "config.json").exists() and not (folder / "status.json").exists():
            continue  # only just begun, or a folder of somebody else's
        try:
            cell = read_cell(folder)
            _check_cell(cell, arms)
        except ValueError as error:
            reason = str(error).replace(f"{folder}/", "").replace(f"{folder}: ", "")
            problems.append({"file": f"cells/{folder.name}", "problem": reason})
        else:
            cells.append(cell)
    return RunDirectory(path, experiment, cells, problems)


def _check_experiment(experiment: dict[str, Any], file: Path) -> None:
    missing = [key for key in REQUIRED if key not in experiment]
    if missing:
        raise ValueError(f"{file}: the keys {', '.join(missing)} are missing; docs/run-directory.md lists them")
    names = [arm["name"] for arm in experiment["arms"]]
    if experiment["baseline"] not in names:
        raise ValueError(f"{file}: the baseline {experiment['baseline']!r} is none of the arms {', '.join(names)}")


def _check_cell(cell: Record, arms: set[str]) -> None:
    missing = [key for key in REQUIRED_OF_A_CELL if key not in cell.config]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    if arm_of(cell) not in arms:
        raise ValueError(f"the arm {arm_of(cell)!r} is none of the arms of experiment.json")
    if cell.status.get("state") not in STATES:
        raise ValueError(f"status.json: the state {cell.status.get('state')!r} is none of {', '.join(STATES)}")


def arm_of(cell: Record) -> str:
    """The name of the cell's arm."""
    return cell.config["arm"]["name"]


def knob_of(cell: Record) -> float | str | None:
    """The value of the swept knob in this cell; None without a sweep."""
    knob = cell.config.get("knob")
    return None if knob is None else knob["value"]


def number(cell: Record, key: str) -> float | None:
    """A finite number from the cell's status; None for null, nan, infinities and what is no number."""
    return as_number(cell.status.get(key))


def as_number(value: Any) -> float | None:
    """The value when it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None
