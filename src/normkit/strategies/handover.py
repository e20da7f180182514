"""Handover: norms of one kind until then, of another from then on."""

from __future__ import annotations

from dataclasses import dataclass

from normkit.strategies.strategy import Once
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.prescription import Prescription
from normkit.vocabulary.spec import find

_OTHERS = ("frozen_batch", "normalizer-free")
"""What :func:`normkit.convert_` takes beside the names of norms."""


@dataclass(frozen=True)
class Handover(Once):
    """From then on the norms are of another kind, fitted on the last batch so that outputs move as little as can be.

    Args:
        at: when; see :mod:`normkit.strategies.trigger`.
        to: what :func:`normkit.convert_` takes: ``"group:8"``, ``"layer"``, ``"rms"``, ``"none"``, ``"batch"``,
            ``"normalizer-free"`` ...

    Raises:
        ValueError: no norm of that name.

    >>> from normkit.strategies import Handover
    >>> print(Handover("50%", "group:8"))
    group:8@50%

    Source: none is known to have been published for convolutional networks; see docs/strategies.md.
    """

    to: str = "group:auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.to not in _OTHERS:
            find(self.to.partition(":")[0])  # a word that nobody knows shall not be found out in the middle of training

    def now(self, evidence: Evidence) -> list[Prescription]:
        return self.prescribe(f"norms become {self.to}", f"it is {self.at}", "convert_", to=self.to)

    def __str__(self) -> str:
        return f"{self.to}@{self.at} {self.coupling}".strip()
