"""Asked: which quantities a measurement is to have, and what each takes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from normkit.measure import structure, updates
from normkit.measure.quantities import QUANTITIES


def asked_for(quantities: Iterable[str] | None, *, batch: bool, loss: bool, optimizer: bool) -> frozenset[str]:
    """The names that are asked for.

    Raises:
        ValueError: one is unknown, or needs what is not there.
    """
    there = {"model": True, "batch": batch, "gradients": batch and loss, "run": False, "probe": False}
    allowed = {name for name, quantity in QUANTITIES.items() if there[quantity.stage]}
    allowed -= OF_OPTIMIZER if not optimizer else set()
    if quantities is None:
        return frozenset(allowed)
    wanted = frozenset([quantities] if isinstance(quantities, str) else quantities)
    for name in sorted(wanted - allowed):
        if name not in QUANTITIES:
            near = difflib.get_close_matches(name, QUANTITIES, n=1, cutoff=0.5)
            suggestion = f"  did you mean {near[0]!r}?\n" if near else ""
            raise ValueError(
                f"there is no quantity named {name!r}.\n{suggestion}  choose from: {', '.join(sorted(QUANTITIES))}"
            )
        stage = QUANTITIES[name].stage
        raise ValueError(f"measure: {name} needs {_TAKES['optimizer' if there[stage] else stage]}")
    return wanted


OF_OPTIMIZER = {updates.EFFECTIVE, *structure.OF_OPTIMIZER}
_TAKES = {
    "batch": "a forward pass.\n  give batch=",
    "gradients": "a backward pass.\n  give batch= and loss_fn=",
    "optimizer": "learning rates.\n  give optimizer=",
    "run": "a run that is watched.\n  use normkit.watch",
    "probe": "passes of its own.\n  call the function of normkit.measure that returns it",
}
