"""Quantity: something that can be measured inside a network, and what its number means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Stage = Literal["model", "batch", "gradients", "run", "probe"]

STAGES: dict[Stage, str] = {
    "model": "read off the model (and its optimizer); no data",
    "batch": "forward passes on one batch",
    "gradients": "one backward pass as well; needs a loss",
    "run": "a training run that is watched",
    "probe": "extra passes on demand",
}
"""What a measurement takes."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """A measurable quantity: the name that readings and rules use, its unit, its formula, its source."""

    name: str
    stage: Stage
    unit: str
    """Empty: a word or names, no number."""
    formula: str
    paper: str = ""
    per: Literal["module", "parameter", "model"] = "module"
    """What a reading's `module` names."""
    means: str = ""
    """In one plain sentence, where the formula is none: what a person sees in the number."""

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"stage {self.stage!r} is unknown.\n  choose from: {', '.join(STAGES)}")
