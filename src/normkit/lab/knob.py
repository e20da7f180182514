"""Sweep: a knob and its values; the comparison is repeated for each value."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from normkit.lab.errors import LabError

ARM_KNOBS = ("init", "dropout")  # belong to the arm
BATCH_SIZE = "batch-size"
WHOLE = (BATCH_SIZE, "depth", "width", "context")  # knobs that count something
MOST_VALUES = 12


@dataclass(frozen=True)
class Sweep:
    """knob: init, dropout, batch-size, or an option of the task such as depth; values: in the order they are run."""

    knob: str
    values: tuple[Any, ...]

    @property
    def option(self) -> str | None:
        """The option of the task that the knob is, or None when it belongs to the arm or to the batch."""
        return None if self.knob in ARM_KNOBS or self.knob == BATCH_SIZE else self.knob.replace("-", "_")


def parse_sweep(text: str) -> Sweep:
    """Reads `init=0.01..10` (log-spaced), `dropout=0,.1,.2,.5` or `batch-size=2..256`.

    A range takes half-decade steps for a real knob (0.01, 0.032, 0.1 ...) and doublings for one that counts.
    """
    knob, equals, right = (part.strip() for part in text.partition("="))
    knob = knob.replace("_", "-")
    if not equals or not knob or not right:
        raise LabError(
            f"--sweep {text!r}: write knob=values, e.g. init=0.01..10, dropout=0,.1,.2,.5 or batch-size=2..256"
        )
    values = _range(text, knob, right) if ".." in right else [parse_value(part) for part in right.split(",")]
    if not 1 <= len(values) <= MOST_VALUES:
        raise LabError(
            f"--sweep {text!r} has {len(values)} values; give at most {MOST_VALUES}, as a list: {knob}=a,b,c"
        )
    return make_sweep(knob, values)


def make_sweep(knob: str, values: Iterable[Any]) -> Sweep:
    """A sweep from a knob and its values, checked; values given twice count once."""
    sweep = Sweep(knob.replace("_", "-"), tuple(dict.fromkeys(values)))
    for value in sweep.values:
        _check(sweep.knob, value)
    return sweep


def parse_value(text: str) -> Any:
    """A number, true, false or a word, as it is typed behind `=`."""
    word = text.strip()
    if not word:
        raise LabError("an empty value; write knob=a,b,c with a value between the commas")
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def _range(text: str, knob: str, right: str) -> list[Any]:
    ends = [parse_value(end) for end in right.split("..")]
    if len(ends) != 2 or not all(isinstance(end, (int, float)) and end > 0 for end in ends) or ends[0] >= ends[1]:
        raise LabError(f"--sweep {text!r}: a range is low..high with 0 < low < high; write a list for other values")
    low, high = ends
    whole = knob in WHOLE and all(isinstance(end, int) for end in ends)
    intervals = max(1, round(math.log(high / low) / math.log(2 if whole else math.sqrt(10))))
    values = [low * (high / low) ** (index / intervals) for index in range(intervals + 1)]
    return [round(value) for value in values] if whole else [float(f"{value:.2g}") for value in values]


def _check(knob: str, value: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if knob == "init" and not (number and value > 0):
        raise LabError(f"--sweep init={value}: a gain is a positive factor on the initial weights")
    if knob == "dropout" and not (number and 0 <= value < 1):
        raise LabError(f"--sweep dropout={value}: a probability lies in 0 <= dropout < 1")
    if knob in WHOLE and not (number and value == int(value) and value >= 1):
        raise LabError(f"--sweep {knob}={value}: {knob} counts something; give whole numbers from 1")
