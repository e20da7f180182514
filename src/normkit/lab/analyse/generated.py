"""What an experiment measured by itself at the end of its runs, and the pictures that it kept of generated samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from normkit.lab.analyse.directory import as_number
from normkit.lab.analyse.intervals import mean_interval
from normkit.vocabulary.record import Record


def measures(ran: Sequence[Record]) -> dict[str, Any] | None:
    """By name: of numbers the mean with its interval, of what is true or false how often it is; None without any."""
    told = [cell.status["measures"] for cell in ran if cell.status.get("measures")]
    names = dict.fromkeys(name for measured in told for name in measured)
    return {name: _over_runs([measured.get(name) for measured in told]) for name in names} or None


def _over_runs(values: Sequence[Any]) -> dict[str, Any]:
    answers = [value for value in values if isinstance(value, bool)]
    if answers:
        return {"true": sum(answers), "of": len(answers)}
    known = [number for value in values if (number := as_number(value)) is not None]
    mean, low, high = mean_interval(known)
    return {"mean": mean, "low": low, "high": high, "n": len(known)}


def pictures(ran: Sequence[Record]) -> dict[str, Any] | None:
    """Those of the first seed that has some."""
    for cell in ran:
        if cell.status.get("pictures"):
            return {"seed": cell.config["seed"], **cell.status["pictures"]}
    return None
