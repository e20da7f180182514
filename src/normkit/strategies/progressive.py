"""Progressive: from layer norm to a batch norm that folds away (RepBN), by a share that falls while training."""

from __future__ import annotations

from dataclasses import dataclass, field

from normkit.strategies.strategy import Ramp
from normkit.strategies.trigger import Moment, State
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.prescription import Prescription


@dataclass(frozen=True, kw_only=True)
class Progressive(Ramp):
    """``y = share * layer_norm(x) + (1 - share) * rep(x)``: the share of the layer norm falls from 1 to 0, linearly.

    At the start nothing moves: the share is 1, and the layer norm keeps its parameters and their momentum. It falls
    with each training batch and is 0 at the end, where the layer norm is taken out. What stays is a batch norm beside
    its input, ``rep(x) = batch_norm(x) + skip * x``; frozen, it folds into the linear layer behind it:
    ``progressive@0%-60% -> frozen@80% -> folded@80%``. RMS norms go the same way.

    Args:
        start: where the share begins to fall, as ``"0%"``.
        end: where the layer norm is taken out, as ``"60%"``.

    >>> from normkit.strategies import Progressive
    >>> print(Progressive(start="0%", end="60%"))
    progressive@0%-60%

    When not to use it: with several batches per optimizer step the share is 0 before the end; over processes in
    DistributedDataParallel, which does not take new parameters (build the model with ``norm="progressive:STEPS"``).

    Source: Guo, Chen, Tang & Wang 2024, arXiv:2405.11582.
    """

    increments: int = field(init=False, default=1)

    def update(self, state: State, moment: Moment, evidence: Evidence) -> list[Prescription]:
        first, last = (point.steps(moment) for point in self.triggers)
        if state["done"] or moment.step < first:
            return []
        if state["at"] < 0:
            state["at"] = 0
            steps = max(last - moment.step, 1)  # one batch in each step that is left
            return self.prescribe(
                "on the way to RepBN", f"it is {self.start}", "progressive_", "identical", steps=steps
            )
        if moment.step < last:
            return []
        state["done"] = True
        return self.prescribe("layer norm taken out", f"it is {self.end}", "settle_", early=True)

    def __str__(self) -> str:
        return f"progressive@{self.start}-{self.end} {self.coupling}".strip()
