"""Words that the claims of rules share, and the number that stands for a series."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from normkit.vocabulary.evidence import Evidence


def several(number: int, word: str, verb: str = "", verb_many: str = "") -> str:
    """``1 layer keeps``, ``3 layers keep``."""
    if number == 1:
        return f"1 {word} {verb}".rstrip()
    return f"{number} {word}s {verb_many}".rstrip()


def where(names: Sequence[str], first: int = 1) -> str:
    """``layer1.bn1`` or ``layer1.bn1 and 3 more``."""
    shown = ", ".join(name or "the model" for name in names[:first])
    more = len(names) - first
    return f"{shown} and {more} more" if more > 0 else shown


def typical(evidence: Evidence, quantity: str, module: str = "") -> float | None:
    """The median over the steps of a run; ``None``: it was not read there."""
    values = [reading.value for reading in evidence.series(quantity, module) if isinstance(reading.value, float | int)]
    return float(statistics.median(values)) if values else None
