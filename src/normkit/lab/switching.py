"""Switching: the strategy of an arm, acting between the steps of the lab's loop."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from torch import nn, optim

from normkit.lab.step import Step
from normkit.loop import Attached

MEASURES = ("switches", "ms_per_step_before", "ms_per_step_after")


class Switching:
    """Acts between steps; what it did is in `record`, and goes into the status of the run."""

    def __init__(self, strategy: str, model: nn.Module, optimizer: optim.Optimizer, steps: int):
        self.attached = Attached(model, optimizer, strategy, total_steps=steps)

    def __call__(self, step: Step) -> None:
        self.attached.log(step.loss)
        self.attached.after_step(((step.inputs,), {}))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return self.attached.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint; the model becomes what it was, before its numbers are loaded."""
        self.attached.load_state_dict(state)

    def measure(self, step_seconds: Sequence[float], steps: int) -> dict[str, Any]:
        """All of MEASURES: the switches, and the median milliseconds of a step before the first and after the last."""
        done = [line["step"] for line in self.attached.record if "failed" not in line]
        first = steps - len(step_seconds)  # a long run has forgotten its first steps
        before = step_seconds[: max(0, done[0] - first)] if done else []
        after = step_seconds[max(0, done[-1] - first) :] if done else []
        median = lambda seconds: 1e3 * statistics.median(seconds) if seconds else None
        return dict(zip(MEASURES, (self.attached.record, median(before), median(after)), strict=True))
