"""When a strategy acts: at a point of training, or once something that is measured says so. Written as text too."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from normkit.vocabulary.evidence import Evidence

State = dict[str, Any]
"""Plain data: numbers, words, lists of them. It goes into a checkpoint as it is."""
GRAMMAR = (
    "a point of training: 25% (of all steps), 500 (steps), 3ep (epochs); or a measurement: mean_drift<0.05 (the "
    "largest of all layers, three times in a row), gradient_noise>5, plateau:200 (200 steps without a better loss)"
)


@dataclass(frozen=True)
class Moment:
    """Where training stands."""

    step: int
    """Optimizer steps that have been taken."""
    total: int | None = None
    """Of the whole run; ``None``: nobody said."""
    per_epoch: int | None = None


class Trigger(Protocol):
    """Says when. Its memory, if it has any, is in the state that it is given."""

    @property
    def needs(self) -> frozenset[str]:
        """The quantities it reads."""

    def due(self, state: State, moment: Moment, evidence: Evidence) -> bool:
        """Whether it is time, or past it."""


@dataclass(frozen=True)
class At:
    """A point of training: after so many steps, epochs, or such a share of all steps."""

    amount: float
    unit: str = "step"

    def __post_init__(self) -> None:
        if self.unit not in ("step", "epoch", "share") or self.amount < 0 or (self.unit == "share" and self.amount > 1):
            raise ValueError(f"At({self.amount!r}, {self.unit!r}) is no point of training.\n  write {GRAMMAR}")

    needs: ClassVar[frozenset[str]] = frozenset()

    def due(self, state: State, moment: Moment, evidence: Evidence) -> bool:
        return moment.step >= self.steps(moment)

    def steps(self, moment: Moment) -> int:
        """The step of this point."""
        known = {"step": 1, "epoch": moment.per_epoch, "share": moment.total}[self.unit]
        if known is None:
            word = {"epoch": "steps_per_epoch=", "share": "total_steps="}[self.unit]
            raise ValueError(f"{self} is not known in steps: give {word} to attach")
        return round(self.amount * known)

    def __str__(self) -> str:
        return {"step": f"{self.amount:g}", "epoch": f"{self.amount:g}ep", "share": f"{100 * self.amount:g}%"}[
            self.unit
        ]


@dataclass(frozen=True)
class Measured:
    """A quantity has been below (or above) a bound, at the worst place, so many times in a row."""

    quantity: str
    bound: float
    below: bool = True
    times: int = 3

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.quantity})

    def due(self, state: State, moment: Moment, evidence: Evidence) -> bool:
        latest = max(
            (r.step or 0 for m in evidence.modules(self.quantity) for r in evidence.series(self.quantity, m)), default=0
        )
        values = [value for _, value in evidence.numbers(self.quantity)]
        if values and latest > state.get("seen", 0):  # each measurement counts once
            worst = max(values) if self.below else min(values)
            holds = worst < self.bound if self.below else worst > self.bound
            state["seen"], state["times"] = latest, state.get("times", 0) + 1 if holds else 0
        return state.get("times", 0) >= self.times

    def __str__(self) -> str:
        return f"{self.quantity}{'<' if self.below else '>'}{self.bound:g}"


@dataclass(frozen=True)
class Plateau:
    """The loss, averaged over ``steps``, has not become better by ``least`` (a share) for as many steps."""

    steps: int
    least: float = 0.01

    needs: ClassVar[frozenset[str]] = frozenset({"loss"})

    def due(self, state: State, moment: Moment, evidence: Evidence) -> bool:
        losses = [float(r.value) for r in evidence.series("loss")[-2 * self.steps :]]  # type: ignore[arg-type]
        if len(losses) < 2 * self.steps:
            return False
        before, now = sum(losses[: self.steps]), sum(losses[self.steps :])
        return now > (1 - self.least) * before

    def __str__(self) -> str:
        return f"plateau:{self.steps}"


def parse(text: str | float | Trigger) -> Trigger:
    """The trigger that is written: ``25%``, ``500``, ``3ep``, ``mean_drift<0.05``, ``plateau:200``.

    Raises:
        ValueError: none of these.
    """
    if isinstance(text, (int, float)):
        return At(text)
    if not isinstance(text, str):
        return text
    word = text.strip()
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)(%|ep)?", word):
        number, unit = float(match[1]), match[2]
        return At(number / 100, "share") if unit == "%" else At(number, "epoch" if unit else "step")
    if match := re.fullmatch(r"(\w+)\s*([<>])\s*(\d+(?:\.\d+)?(?:e-?\d+)?)", word):
        return Measured(match[1], float(match[3]), below=match[2] == "<")
    if match := re.fullmatch(r"plateau:(\d+)", word):
        return Plateau(int(match[1]))
    raise ValueError(f"{text!r} says no time.\n  write {GRAMMAR}")
