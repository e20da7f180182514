"""Record: what one run left on disk, and the only functions that read and write it.

A run directory (docs/run-directory.md) is strict JSON: a non-finite number is the string "nan", "inf" or "-inf". Two
promises hold whatever kills the process: a JSON file is either the old one or the new one (written beside it, then
renamed), and a JSON-lines file loses at most its last line.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1
STATES = ("pending", "running", "done", "diverged", "failed")
FINISHED = ("done", "diverged", "failed")

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True)
class Record:
    """One cell of an experiment as its directory tells it: what was asked, how it ended, what happened on the way."""

    name: str  # of the directory below cells/
    config: dict[str, Any]
    status: dict[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    inside: list[dict[str, Any]] = field(default_factory=list)

    @property
    def state(self) -> str:
        return self.status["state"]

    @property
    def finished(self) -> bool:
        return self.state in FINISHED


def encode(value: Any) -> Any:
    """The value with every non-finite float as a string, tuples as lists and paths as text: strict JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, dict):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def decode(value: Any) -> Any:
    """The inverse of `encode` for numbers: "nan", "inf" and "-inf" become floats again."""
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decode(item) for item in value]
    return value


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces the file in one step, so that a reader (or a kill -9) never meets half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Writes one JSON document, atomically."""
    write_atomically(path, (json.dumps(encode(value), indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Reads one JSON document; raises ValueError with the file's name when it is not strict JSON."""
    try:
        return decode(json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON document ({error}); delete the file and run the command again") from None


def encode_line(value: dict[str, Any]) -> bytes:
    """One line of a JSON-lines file."""
    return (json.dumps(encode(value), allow_nan=False, ensure_ascii=False) + "\n").encode()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads a JSON-lines file, [] when it is missing; a torn last line (the writer was killed) is dropped."""
    if not path.exists():
        return []
    *lines, torn = path.read_bytes().split(b"\n")
    del torn  # what follows the last newline: empty, or half a line
    return [_read_line(path, number, line) for number, line in enumerate(lines, 1)]


def read_cell(directory: Path) -> Record:
    """Reads cells/<cell>; raises ValueError when it has no configuration or no status."""
    for name in ("config.json", "status.json"):
        if not (directory / name).exists():
            raise ValueError(
                f"{directory}: {name} is missing, so this is no cell of a run; delete the directory and run the "
                "command again"
            )
    config, status = read_json(directory / "config.json"), read_json(directory / "status.json")
    metrics, inside = read_lines(directory / "metrics.jsonl"), read_lines(directory / "inside.jsonl")
    return Record(directory.name, config, status, metrics, inside)


def read_cells(directory: Path) -> list[Record]:
    """Reads every cell of an experiment, sorted by name; directories that were only just begun are left out."""
    cells = sorted(path for path in (directory / "cells").glob("*") if path.is_dir())
    return [read_cell(path) for path in cells if (path / "status.json").exists()]


def read_experiment(directory: Path) -> dict[str, Any]:
    """Reads DIR/experiment.json; raises ValueError when DIR is no run directory or of a later schema."""
    path = directory / "experiment.json"
    if not path.exists():
        raise ValueError(
            f"{directory}: no experiment.json, so this is no run directory; give the directory that "
            "`normkit compare` printed, e.g. runs/digits-1a2b3c4d"
        )
    experiment = read_json(path)
    if experiment.get("schema") != SCHEMA:
        raise ValueError(
            f"{path}: schema {experiment.get('schema')!r}, this normkit reads schema {SCHEMA}; use the normkit "
            "version that wrote it (key `environment`)"
        )
    return experiment


def _read_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        return decode(json.loads(line, parse_constant=_refuse_constant))
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: not strict JSON ({error})") from None


def _refuse_constant(word: str) -> float:
    raise ValueError(f'{word} is no JSON; a non-finite number is the string "nan", "inf" or "-inf"')
