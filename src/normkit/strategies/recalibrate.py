"""Recalibrate: running statistics measured anew, again and again."""

from __future__ import annotations

from dataclasses import dataclass

from normkit.strategies.strategy import Strategy
from normkit.strategies.trigger import Moment, State
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.prescription import Prescription


@dataclass(frozen=True)
class Recalibrate(Strategy):
    """Every so many steps the running statistics are estimated from ``loader=`` of ``attach`` with the weights of now.

    Args:
        every: optimizer steps between.
        steps: batches of the loader that are taken.

    Raises:
        ValueError: an interval below 1.

    >>> from normkit.strategies import Recalibrate
    >>> print(Recalibrate(500))
    recalibrate/500

    Source: Wu & Johnson 2021, arXiv:2105.07576, section 3.1 (PreciseBN).
    """

    every: int
    steps: int = 50

    def __post_init__(self) -> None:
        if self.every < 1 or self.steps < 1:
            raise ValueError(f"Recalibrate: every={self.every}, steps={self.steps}; both are 1 or more")

    def update(self, state: State, moment: Moment, evidence: Evidence) -> list[Prescription]:
        if moment.step % self.every or not moment.step:
            return []
        reason = f"{self.every} steps have passed"
        return self.prescribe("statistics calibrated", reason, "calibrate_", "train_identical", steps=self.steps)

    def __str__(self) -> str:
        return f"recalibrate/{self.every}"
