"""Findings in words: as the lines of a report, as plain data, and as commands that try what they prescribe."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from normkit.vocabulary.finding import Finding

_MODULES = 4  # names of places in one line of repr


def several(number: int, word: str) -> str:
    """``1 error``, ``2 errors``."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def lines(finding: Finding) -> list[str]:
    """A finding as it is printed: the claim, where, the number, what to do, how to check."""
    more = len(finding.modules) - _MODULES
    where = ", ".join(name or "(the model)" for name in finding.modules[:_MODULES]) + (f" and {more} more" * (more > 0))
    measured = "" if finding.measured is None else f"{finding.quantity} = {_number(finding.measured)}"
    limit = "" if finding.threshold in (None, "") else f", limit {_number(finding.threshold)}"
    source = f" ({finding.source})" if finding.source else ""
    told = [f"  {finding.severity:<7} {finding.rule}: {finding.claim}"]
    told += [f"          where: {where}"] if where else []
    told += [f"          measured: {measured}{limit}{source}"] if measured else []
    for prescription in finding.prescriptions[:2]:
        first, *others = prescription.code.splitlines() or [prescription.action]
        told += [f"          do [{prescription.safety}]: {first}", *(f"              {line}" for line in others)]
    told += [f"          try: {command}" for command in experiments(finding)]
    return [*told, *([f"          then: {finding.check}"] if finding.check else [])]


def plain(finding: Finding) -> dict[str, Any]:
    """A finding as plain data, with the code of its prescriptions."""
    data = asdict(finding) | {"experiments": experiments(finding)}
    for row, prescription in zip(data["prescriptions"], finding.prescriptions, strict=True):
        row["code"] = prescription.code
    return data


def experiments(finding: Finding) -> list[str]:
    """Commands that try an unsafe prescription before anything is decided: a comparison of paired runs."""
    kinds = [str(dict(p.options).get("to")) for p in finding.prescriptions if p.operation == "convert_"]
    arms = [f"batch,{kind.replace('group:auto', 'group:8')}" for kind in kinds]
    arms += [prescription.arms for prescription in finding.prescriptions if prescription.arms]
    return [f"normkit compare my_experiment.py:run --arms {one}" for one in arms]


def glossary(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """What these quantities are, as their own records say it; of what a loop has logged, nothing is known."""
    from normkit.watching.quantities import ALL

    fields = ("means", "formula", "unit", "paper", "per")
    return {name: {field: getattr(ALL[name], field) for field in fields} for name in sorted(names) if name in ALL}


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
