"""Spacing: which steps are sampled, so that watching costs no more than it may."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

STEPS, SAMPLES = 25, 3
"""How many of the last steps and samples a median is taken of."""


class Spacing:
    """Steps 1 and 1 + ``every`` are sampled; then every so many, or as many more as the cost of a sample asks for.

    Args:
        every: steps between samples, at least.
        budget: greatest share of the training time that watching may take; ``None``: ``every``, whatever it costs.
        step: the number of steps already done.
    """

    def __init__(self, every: int, budget: float | None, step: int = 0) -> None:
        self.every, self.budget = every, budget
        self.next = step + 1
        self.interval = every
        self.samples = 0
        self.own, self.training = 0.0, 0.0
        """Seconds spent by watching, and by everything else, since the first step."""
        self._steps: deque[float] = deque(maxlen=STEPS)
        self._samples: deque[float] = deque(maxlen=SAMPLES)

    def due(self, step: int) -> bool:
        """Whether this step is sampled."""
        return step >= self.next

    def stepped(self, seconds: float, own: float) -> None:
        """A step is over: what it took, and what watching it took beside that."""
        self.training += seconds
        self.own += own
        self._steps.append(seconds)

    def sampled(self, step: int, seconds: float, step_seconds: float | None = None) -> None:
        """A sample is taken: choose the next one. The first, in which everything is set up, counts only while alone."""
        if self.samples == 1:
            self._samples.clear()
        self.samples += 1
        self._samples.append(seconds)
        usual = self.step_seconds if step_seconds is None else step_seconds
        self.interval = self.every
        if self.budget is not None and usual and self.samples > 1:
            self.interval = max(self.every, math.ceil(self.sample_seconds / (self.budget * usual)))
        self.next = step + self.interval

    @property
    def step_seconds(self) -> float:
        """Median of the last steps, without what watching took; 0 before the first."""
        return statistics.median(self._steps) if self._steps else 0.0

    @property
    def sample_seconds(self) -> float:
        """Median of the last samples."""
        return statistics.median(self._samples) if self._samples else 0.0

    def told(self) -> dict[str, Any]:
        """What it costs: the share so far, the cost of one sample, of one step, and how far samples are apart."""
        return {
            "share": self.own / self.training if self.training else 0.0,
            "sample_ms": 1e3 * self.sample_seconds,
            "step_ms": 1e3 * self.step_seconds,
            "interval": self.interval,
            "every": self.every,
            "budget": self.budget,
        }
