"""Freeze: batch statistics until then, running statistics from then on."""

from __future__ import annotations

from dataclasses import dataclass

from normkit.strategies.strategy import Once
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.prescription import Prescription


@dataclass(frozen=True)
class Freeze(Once):
    """From then on the batch norms normalise by their running statistics, which stay; weight and bias go on learning.

    What a frozen network does no longer depends on the batch, so training and evaluation are the same function. But its
    weights are no longer free of scale: the same learning rate can be too great (docs/strategies.md has measurements).

    >>> from normkit.strategies import Coupling, Freeze
    >>> print(Freeze("25%", coupling=Coupling(divide=10)))
    frozen@25% lr/10

    Source: a frozen finish is in Wu & Johnson 2021, arXiv:2105.07576, section 3.3.
    """

    def now(self, evidence: Evidence) -> list[Prescription]:
        return self.prescribe("frozen", f"it is {self.at}", "freeze_", "eval_identical", statistics=True, affine=False)

    def __str__(self) -> str:
        return f"frozen@{self.at} {self.coupling}".strip()
