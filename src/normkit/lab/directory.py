"""The run directory as the engine writes it: experiment.json and one place per cell (docs/run-directory.md)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from normkit.lab.cell import Cell
from normkit.lab.errors import LabError
from normkit.lab.experiment import Experiment
from normkit.lab.parallel import Parallel
from normkit.lab.recipe import Recipe
from normkit.lab.search import Choice
from normkit.vocabulary.record import SCHEMA, encode, read_experiment, read_json, write_json


def default_directory(recipe: Recipe) -> Path:
    """runs/<name>-<hash>: another question has another hash, so it never meets old results."""
    return Path("runs") / f"{re.sub(r'[^A-Za-z0-9.]+', '-', recipe.name)}-{recipe.hash}"


def open_directory(
    directory: Path, recipe: Recipe, experiment: Experiment, split: dict[str, int], parallel: Parallel, command: str
) -> dict[str, Any]:
    """Begins a run directory, or goes on in one that holds the same question; returns the environment of this command.

    Raises LabError when it holds another question: results are never overwritten. The number of threads per cell stays
    what it was when the directory was begun, because it may change the last bits of a sum.
    """
    from normkit.lab.environment import environment

    here = environment(parallel)
    path = directory / "experiment.json"
    if path.exists():
        return here | {"threads": _same_question(directory, recipe)}
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise LabError(f"--out {directory} exists and is no run directory; give a new or an empty directory")
    (directory / "cells").mkdir(parents=True)
    write_json(
        path,
        {
            "schema": SCHEMA,
            "name": recipe.name,
            "title": experiment.title or recipe.name,
            "description": experiment.description,
            "command": command,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "metric": experiment.metric.record(),
            "split": split,
            **recipe.question(),
            "hash": recipe.hash,
            "chosen": {},
            "environment": here,
        },
    )
    return here


def note_environment(directory: Path, here: Mapping[str, Any]) -> None:
    """Adds the environment in which runs are about to go on to experiment.json, when it is another than before.

    Runs of two versions, or of two machines, may lie in one directory; the page then says so.
    """
    content = read_experiment(directory)
    later = content.get("continued_in", [])
    if here not in [content["environment"], *later]:
        content["continued_in"] = [*later, dict(here)]
        write_json(directory / "experiment.json", content)


def prepare_cell(directory: Path, cell: Cell) -> dict[str, Any]:
    """Makes the cell's place when it is new, and returns its status."""
    place = directory / "cells" / cell.name
    if not (place / "status.json").exists():
        place.mkdir(parents=True, exist_ok=True)
        write_json(place / "config.json", cell.config())
        write_json(place / "status.json", {"state": "pending", "reason": None, "attempts": 0})
    try:
        return read_json(place / "status.json")
    except ValueError as error:
        raise LabError(str(error)) from None


def write_status(directory: Path, cell: Cell, status: Mapping[str, Any]) -> None:
    """Replaces the status of a cell."""
    write_json(directory / "cells" / cell.name / "status.json", dict(status))


def read_chosen(directory: Path) -> dict[str, Any]:
    """The rates that were chosen so far."""
    return read_experiment(directory)["chosen"]


def write_chosen(directory: Path, chosen: Mapping[str, Choice], rates: Mapping[str, list[float]]) -> None:
    """Adds chosen rates, and the rates each value of the knob was searched at, to experiment.json."""
    content = read_experiment(directory)
    content["chosen"] |= {key: choice.record() for key, choice in chosen.items()}
    content["rates"]["searched"] = content["rates"].get("searched", {}) | dict(rates)
    write_json(directory / "experiment.json", content)


def _same_question(directory: Path, recipe: Recipe) -> int:
    try:
        content = read_experiment(directory)
    except ValueError as error:
        raise LabError(str(error)) from None
    asked = _flat(encode(recipe.question()))
    found = _flat(encode({key: content.get(key) for key in recipe.question()}))
    differences = [f"{key} was {found[key]}, now {asked[key]}" for key in asked if asked[key] != found[key]]
    if differences:
        raise LabError(
            f"{directory} holds another experiment: {'; '.join(differences)}. Its results are kept: give another "
            "--out, or none to get a directory of its own"
        )
    return int(content["environment"]["threads"])


def _flat(question: dict[str, Any]) -> dict[str, str]:
    """The parts of a question in words, so that a difference is named by what differs and by nothing else."""
    flat = {key: str(value) for key, value in question.items() if key not in ("arms", "rates")}
    flat["arms"] = ", ".join(arm["name"] for arm in question["arms"])
    flat["optimizer"] = ", ".join(arm["optimizer"] for arm in question["arms"])
    return flat | {"learning rates": str(question["rates"]["grid"]), "search seeds": str(question["rates"]["seeds"])}
