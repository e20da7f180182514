"""What a watched run reads: everything there is, and two quantities that only a run has."""

from __future__ import annotations

from normkit.measure.quantities import QUANTITIES
from normkit.vocabulary.quantity import Quantity

FORWARD_PASSES = Quantity(
    "forward_passes", "run", "per step", "forward passes in training between two optimizer steps", per="model"
)
RANK_SPREAD = Quantity(
    "rank_spread",
    "run",
    "deviations",
    "max over channels of (greatest - least running mean over processes) / sqrt(running_var + eps)",
)
ALL: dict[str, Quantity] = {**QUANTITIES, FORWARD_PASSES.name: FORWARD_PASSES, RANK_SPREAD.name: RANK_SPREAD}
"""By name."""

DEAR = frozenset({"stable_rank", "orthogonality_gap"})
"""Asked for by name only: they take the products of a matrix per layer."""


def usual() -> frozenset[str]:
    """What is read unless somebody says otherwise."""
    return frozenset(name for name, quantity in ALL.items() if quantity.stage != "probe") - DEAR
