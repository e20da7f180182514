"""The directory of a watched run: what is written while it goes on, and how it is read again (docs/watch.md)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from normkit.vocabulary.finding import Finding
from normkit.vocabulary.reading import Reading
from normkit.vocabulary.record import encode_line, read_json, read_lines, write_json
from normkit.watching.quantities import ALL

log = logging.getLogger(__name__)
SCHEMA = 1
ABOUT, READINGS, FINDINGS, PAGE = "watch.json", "readings.jsonl", "findings.jsonl", "report.html"
SAMPLES = 200
"""A longer run is thinned out to so many when it is read, evenly; the last is always among them."""
DIGITS = 6


class RunDirectory:
    """Appends a line per sample; a kill loses half of the last one at most.

    Args:
        path: made, where it is not there. One that holds a run already is left as it is, and the first free one of
            ``path-2``, ``path-3`` ... is taken, unless ``resumed``.
        about: the content of watch.json.
        resumed: go on behind what is there.
    """

    def __init__(self, path: Path, about: dict[str, Any], *, resumed: bool) -> None:
        self.path = path if resumed else free(path)
        if self.path != path:
            log.info("%s holds a run already; this one is written to %s", path, self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.about = {"schema": SCHEMA, "name": self.path.name, **about}
        write_json(self.path / ABOUT, self.about)
        self._files = {name: open(self.path / name, "ab", buffering=0) for name in (READINGS, FINDINGS)}  # noqa: SIM115

    def sample(self, step: int, readings: Iterable[Reading], facts: dict[str, Any]) -> None:
        """One line: the step, what the sample cost, the values by quantity and place, what was logged on the way."""
        values: dict[str, dict[str, Any]] = {}
        logged = []
        for reading in readings:
            if reading.step == step:
                values.setdefault(reading.quantity, {})[reading.module] = _rounded(reading.value)
            else:
                logged.append([reading.step, reading.quantity, _rounded(reading.value)])
        self._files[READINGS].write(encode_line({"step": step, **facts, "values": values, "logged": logged}))

    def finding(self, finding: Finding, step: int) -> None:
        """One line, as it fires."""
        codes = [prescription.code for prescription in finding.prescriptions]
        self._files[FINDINGS].write(encode_line({"at_step": step, **asdict(finding), "codes": codes}))

    def update(self, **facts: Any) -> None:
        """Replaces what watch.json says, in one step."""
        self.about |= facts
        write_json(self.path / ABOUT, self.about)

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def free(path: Path) -> Path:
    """The path, or the first of path-2, path-3 ... that holds no run."""
    number, chosen = 1, path
    while (chosen / ABOUT).exists():
        number += 1
        chosen = path.with_name(f"{path.name}-{number}")
    return chosen


def is_run(path: Path) -> bool:
    """Whether a watched run lies there."""
    return (path / ABOUT).is_file()


def read_about(path: Path) -> dict[str, Any]:
    """watch.json.

    Raises:
        ValueError: there is none, or a later normkit has written it.
    """
    if not is_run(path):
        raise ValueError(f'{path}: no {ABOUT}, so no run was watched there.\n  nk.watch(..., out="{path}") makes one')
    about = read_json(path / ABOUT)
    if about.get("schema") != SCHEMA:
        raise ValueError(f"{path / ABOUT}: schema {about.get('schema')!r}, and this normkit reads schema {SCHEMA}")
    return about


def read_readings(path: Path) -> tuple[list[Reading], list[dict[str, Any]]]:
    """Every reading of at most ``SAMPLES`` samples, and the facts of those that were chosen."""
    lines = thinned(read_lines(path / READINGS), SAMPLES)
    return [reading for line in lines for reading in _readings(line)], [_facts(line) for line in lines]


def thinned(items: list[Any], most: int) -> list[Any]:
    """Evenly; first and last stay."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _readings(line: dict[str, Any]) -> Iterator[Reading]:
    for step, quantity, value in line["logged"]:
        yield Reading(quantity, value, "", step, unit_of(quantity))
    for quantity, by_place in line["values"].items():
        for place, value in by_place.items():
            yield Reading(quantity, value, place, line["step"], unit_of(quantity))


def unit_of(quantity: str) -> str:
    """Empty for what the training loop has logged under a name of its own."""
    return ALL[quantity].unit if quantity in ALL else ""


def _facts(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in ("values", "logged")}


def _rounded(value: Any) -> Any:
    """Six digits: the file is half as long, and no rule looks closer."""
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
