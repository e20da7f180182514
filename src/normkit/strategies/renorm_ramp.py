"""RenormRamp: from batch norm towards what evaluation does, by opening the bounds of batch renormalization."""

from __future__ import annotations

from dataclasses import dataclass

from normkit.strategies.strategy import Ramp
from normkit.vocabulary.prescription import Prescription


@dataclass(frozen=True, kw_only=True)
class RenormRamp(Ramp):
    """``r_max`` opens from 1 and ``d_max`` from 0, both linearly; at the end the layers keep ``Renorm(r_max, d_max)``.

    >>> from normkit.strategies import RenormRamp
    >>> print(RenormRamp(start="5%", end="40%"))
    renorm@5%-40%

    Source: Ioffe 2017, arXiv:1702.03275, whose schedule counts updates; this one counts shares of a run.
    """

    r_max: float = 3.0
    d_max: float = 5.0

    def at(self, share: float) -> list[Prescription]:
        r_max, d_max = round(1 + share * (self.r_max - 1), 6), round(share * self.d_max, 6)
        words = f"bounds at {r_max:g}, {d_max:g}"
        return self.prescribe(
            words, "the bounds open", "set_statistics_", "eval_identical", statistics=f"renorm:{r_max}:{d_max}:0"
        )

    def __str__(self) -> str:
        return f"renorm@{self.start}-{self.end} {self.coupling}".strip()
