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


def settled(evidence: Evidence, module: str, quantity: str) -> bool:
    """Whether running statistics can be held against what was read there: training that has just begun moves them.

    In a run the step of the reading counts, elsewhere the batches that were seen.
    """
    momentum = evidence.number("momentum", module)
    if momentum is None or evidence.number("in_training", module) == 0:
        return True
    last = evidence.series(quantity, module)[-1:] or evidence.series(quantity)[-1:]
    step = last[0].step if last else None
    seen = max(evidence.number("batches_seen", module) or 0.0, 0 if step is None else step)
    known = "batches_seen" in evidence or step is not None
    return not known or (1 - momentum) ** seen <= START


START = 0.05
"""Share of the 0 and 1 of the start from which on an average is one: 29 batches at momentum 0.1."""


def loses(evidence: Evidence) -> bool:
    """Whether evaluation loses what training has: the loss by running statistics is far above that by the batch's.

    Of the healthy models of docs/doctor.md the worst has 2.6 times the loss, and 0.1 more.
    """
    running, batchwise = evidence.number("loss_running"), evidence.number("loss_batch_statistics")
    return running is not None and batchwise is not None and running > max(LOSS * batchwise, batchwise + MORE)


LOSS, MORE = 3.0, 0.2


def losses(evidence: Evidence) -> str:
    """The two losses in words; empty where there is no loss."""
    running, batchwise = evidence.number("loss_running"), evidence.number("loss_batch_statistics")
    if running is None or batchwise is None:
        return ""
    return f"; the loss is {running:.3g} by them and {batchwise:.3g} by the statistics of this batch"
