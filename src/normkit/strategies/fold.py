"""Fold: frozen norms go into the layers beside them, and training goes on with a cheaper network."""

from __future__ import annotations

from dataclasses import dataclass

from normkit.strategies.strategy import Once
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.prescription import Prescription


@dataclass(frozen=True)
class Fold(Once):
    """From then on the layers have the frozen norms in their weights, and no norm is computed any more.

    It follows :class:`~normkit.strategies.Freeze` or :class:`~normkit.strategies.Taper`: a norm that still goes by the
    batch is left. What the network computes stays; the gradients of the folded weights are others.

    >>> from normkit.strategies import parse
    >>> print(parse("batch -> frozen@50% lr/10 -> folded@60%"))
    frozen@50% lr/10 -> folded@60%

    Source: folding for inference is Jacob et al. 2018, arXiv:1712.05877, section 3.2.
    """

    def now(self, evidence: Evidence) -> list[Prescription]:
        return self.prescribe("norms folded", f"it is {self.at}", "fold_", "eval_identical")

    def __str__(self) -> str:
        return f"folded@{self.at} {self.coupling}".strip()
