"""What a watched run reads: everything there is, and what a run alone has."""

from __future__ import annotations

from normkit.measure.quantities import QUANTITIES
from normkit.vocabulary.quantity import Quantity

FORWARD_PASSES = Quantity(
    "forward_passes", "run", "per step", "forward passes in training between two optimizer steps", per="model"
)
BACKWARD_PASSES = Quantity(
    "backward_passes", "run", "per step", "backward passes between two optimizer steps", per="model"
)
RANK_SPREAD = Quantity(
    "rank_spread",
    "run",
    "deviations",
    "max over channels of (greatest - least running mean over processes) / sqrt(running_var + eps)",
    means="How far the running means of the processes are apart.",
)
FIRST_NAN = Quantity("first_nan", "run", "", "where the first gradient that is not finite comes from, in words")
OVERWRITTEN = Quantity(
    "buffers_overwritten",
    "run",
    "1: yes, 0: no",
    "whether DistributedDataParallel writes over buffers that a forward pass has saved for its backward pass",
    per="model",
)
OF_A_RUN = (FORWARD_PASSES, BACKWARD_PASSES, RANK_SPREAD, OVERWRITTEN, FIRST_NAN)
ALL: dict[str, Quantity] = {**QUANTITIES, **{quantity.name: quantity for quantity in OF_A_RUN}}
"""By name."""

DEAR = frozenset({"stable_rank", "orthogonality_gap"})
"""Asked for by name only: they take the products of a matrix per layer."""


def usual() -> frozenset[str]:
    """What is read unless somebody says otherwise."""
    return frozenset(name for name, quantity in ALL.items() if quantity.stage != "probe") - DEAR
