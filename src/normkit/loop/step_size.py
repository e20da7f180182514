"""The learning rate of an optimizer, cut and warmed up again from outside, beside whatever scheduler there is."""

from __future__ import annotations

from typing import Any

from torch import optim

from normkit.strategies.coupling import Coupling

_RATES = ("lr", "initial_lr", "max_lr", "min_lr")


class StepSize:
    """Multiplies every learning rate; schedulers go on from the new ones.

    Args:
        optimizer: whose rates.
        scheduler: of :mod:`torch.optim.lr_scheduler`, so that it computes from the new rates.
    """

    def __init__(self, optimizer: optim.Optimizer, scheduler: Any = None) -> None:
        self.optimizer, self.scheduler = optimizer, scheduler
        self.warming: tuple[int, int] | None = None
        """Steps behind, and steps in all, of a warm-up that is on."""
        self.clip: float | None = None

    def couple(self, coupling: Coupling) -> None:
        """Do what a coupling says."""
        if coupling.rewarm:
            self._multiply(1 / self._factor())  # of a warm-up that is not over
            self.warming = 0, coupling.rewarm
            self._multiply(self._factor())
        if coupling.divide != 1:
            self._multiply(1 / coupling.divide)

    def check(self, coupling: Coupling) -> None:
        """Whether a coupling can be carried out.

        Raises:
            ValueError: a scheduler steps this optimizer, and is not known here: it would undo the change.
        """
        changes = coupling.divide != 1 or coupling.rewarm
        if changes and self.scheduler is None and getattr(self.optimizer.step, "_wrapped_by_lr_sched", False):
            raise ValueError(
                f"{coupling} changes the learning rate, and a scheduler sets it: give attach(..., scheduler=scheduler)"
            )

    def after_step(self) -> None:
        """A step was taken: a warm-up goes on."""
        if self.warming is None:
            return
        before = self._factor()
        done, total = self.warming
        self.warming = (done + 1, total) if done + 1 < total else None
        self._multiply(self._factor() / before)

    def _factor(self) -> float:
        """Where the warm-up is: 1 / steps for the first step after it began, 1 when it is over."""
        return 1.0 if self.warming is None else (self.warming[0] + 1) / (self.warming[1] + 1)

    def _multiply(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            for name in _RATES:
                if name in group:
                    group[name] = group[name] * factor
        for name in ("base_lrs", "_last_lr"):
            if hasattr(self.scheduler, name):
                setattr(self.scheduler, name, [rate * factor for rate in getattr(self.scheduler, name)])

    def state_dict(self) -> dict[str, Any]:
        """The rates themselves are in the optimizer's and the scheduler's."""
        return {"warming": self.warming, "clip": self.clip}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        self.warming = None if state["warming"] is None else tuple(state["warming"])
        self.clip = state["clip"]
