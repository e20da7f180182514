"""Taper: from the batch's statistics to constants by a smooth gate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from normkit.strategies.strategy import Ramp
from normkit.vocabulary.prescription import Prescription


@dataclass(frozen=True, kw_only=True)
class Taper(Ramp):
    """The batch's share in what normalises goes from 1 to 0 by a half cosine; then the layers are frozen.

    On the way the layers have ``statistics=Taper(gate)``; at the end they are affine maps, and :func:`normkit.fold`
    makes them part of the layers before them, exactly.

    Args:
        start: where the gate begins to close, as ``"20%"``.
        end: where it is closed.
        increments: steps of the gate on the way.

    >>> from normkit.strategies import Taper
    >>> print(Taper(start="20%", end="60%"))
    taper@20%-60%

    Source: TaperNorm, arXiv:2602.10408, which does it to layer and RMS norm; here it is done to batch norm.
    """

    def at(self, share: float) -> list[Prescription]:
        if share == 1:
            return self.prescribe(
                "frozen", "the gate is closed", "freeze_", "eval_identical", statistics=True, affine=False
            )
        gate = round((1 + math.cos(math.pi * share)) / 2, 6)
        return self.prescribe(
            f"gate at {gate:g}", "the gate closes", "set_statistics_", "eval_identical", statistics=f"taper:{gate}"
        )

    def __str__(self) -> str:
        return f"taper@{self.start}-{self.end} {self.coupling}".strip()
