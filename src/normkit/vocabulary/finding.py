"""Finding: one claim about a model or a run, the number it rests on, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from normkit.vocabulary.prescription import Prescription

Severity = Literal["error", "warning", "note"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""Worst first. error: wrong results or failing training; warning: it costs accuracy or speed; note: good to know."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a rule says about one place. ``measured`` against ``threshold`` is the evidence."""

    rule: str
    severity: Severity
    claim: str
    """A sentence with the numbers in it."""
    modules: tuple[str, ...] = ()
    """Where: names of modules or parameters; empty: the model itself."""
    quantity: str = ""
    measured: float | str | None = None
    threshold: float | str | None = None
    source: str = ""
    """Where the threshold comes from."""
    step: int | None = None
    prescriptions: tuple[Prescription, ...] = ()
    """Best first."""
    check: str = ""
    """How to see that it helped: code or a command."""

    def __post_init__(self) -> None:
        if self.severity not in SEVERITIES:
            raise ValueError(f"severity {self.severity!r} is unknown.\n  choose from: {', '.join(SEVERITIES)}")


def worst_first(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """By severity; equal ones stay in the order in which the rules gave them."""
    return tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)))
