"""GhostRamp: the part of a batch that is normalised together grows or shrinks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from normkit.strategies.strategy import Ramp
from normkit.vocabulary.prescription import Prescription


@dataclass(frozen=True, kw_only=True)
class GhostRamp(Ramp):
    """The ghost batch goes from one size to another, by equal factors: much noise first, little later, or the reverse.

    Args:
        sizes: samples per part at the start and at the end, 2 or more each.

    Raises:
        ValueError: sizes that are none.

    >>> from normkit.strategies import GhostRamp
    >>> print(GhostRamp(start="0%", end="80%", sizes=(8, 64)))
    ghost:8-64@0%-80%

    Source: ghost batches are Hoffer et al. 2017, arXiv:1705.08741; the ramp is this library's.
    """

    sizes: tuple[int, int] = (8, 64)
    increments: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.sizes) != 2 or not all(isinstance(size, int) and size >= 2 for size in self.sizes):
            raise ValueError(
                f"GhostRamp: sizes={self.sizes!r}; give two numbers of samples, 2 or more each, as (8, 64)"
            )

    def at(self, share: float) -> list[Prescription]:
        first, last = self.sizes
        size = round(math.exp((1 - share) * math.log(first) + share * math.log(last)))
        return self.prescribe(
            f"parts of {size}",
            "the ghost batch changes",
            "set_statistics_",
            "eval_identical",
            statistics=f"ghost:{size}",
        )

    def __str__(self) -> str:
        return f"ghost:{self.sizes[0]}-{self.sizes[1]}@{self.start}-{self.end} {self.coupling}".strip()
