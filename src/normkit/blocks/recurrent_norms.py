"""A norm inside a recurrent layer: for all time steps at once where nothing ties it to one, or step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normkit.blocks.recurrent_padding import Ends
from normkit.blocks.token_norms import NormName
from normkit.create import create
from normkit.statistics.per_step import PerStep

Applied = Callable[[Tensor, int, Tensor | None], Tensor]
PLACEMENTS = ("all", "input")
SMALL = 0.1
"""The first weight of batch norm in the paper: tanh of a standard normal input passes too little gradient on."""


class StepNorm(nn.Module):
    """A norm on (n, c), or on (steps, n, c), that knows which time step it is and who has ended."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm: Any = norm

    @property
    def per_step(self) -> bool:
        """Whether every time step has statistics of its own."""
        return isinstance(getattr(self.norm, "statistics", None), PerStep)

    @property
    def over_samples(self) -> bool:
        """Whether samples share statistics, so that it must know who has ended."""
        spec: Any = getattr(self.norm, "spec", None)
        return spec is not None and "[n]" in (spec.over or "")

    def reset(self, scale: float | None, *, alone: bool) -> None:
        """As new, with the first scale; ``alone``: there is no norm on the hidden part."""
        if hasattr(self.norm, "reset_parameters"):
            self.norm.reset_parameters()
        if scale is None:
            scale = SMALL if self.over_samples and not alone else 1.0
        if scale != 1.0 and getattr(self.norm, "weight", None) is not None:
            nn.init.constant_(self.norm.weight, scale)

    def by_step(self) -> Applied:
        """``(x, step, going)`` -> the norm of (n, c) at a time step; ``going``: (n,), who has not ended; or ``None``.

        In evaluation no step is later than the last one that training has reached, which is read here, once.
        """
        reached = None
        if self.per_step and not self.norm.training:  # the norm's own mode: a layer that trains may hold a frozen one
            reached = int((self.norm.statistics_state.batches > 0).sum())

        def applied(x: Tensor, step: int, going: Tensor | None) -> Tensor:
            options: dict[str, Any] = {}
            if self.per_step:
                options["step"] = step if reached is None else min(step, max(reached - 1, 0))
            if going is not None and self.over_samples:
                options["mask"] = going
            return self.norm(x, **options)

        return applied

    def all_steps(self, x: Tensor, ends: Ends) -> Tensor:
        """(steps, n, c), each time step by itself where its statistics are its own."""
        if self.per_step:
            applied = self.by_step()
            done = [applied(own, t, ends.going(t)) for t, own in enumerate(x[: ends.longest].unbind(0))]
            return torch.stack([*done, *x[ends.longest :]])
        if ends.counts is None or not self.over_samples:
            return self.norm(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.norm(x.flatten(0, 1), mask=ends.counts.flatten()).unflatten(0, x.shape[:2])


def step_norm(norm: NormName, channels: int, bias: bool, where: dict[str, Any]) -> StepNorm:
    """The norm of a name, or what a function of the channels makes; without a bias, where there is another one."""
    made = norm(channels).to(**where) if callable(norm) else create(norm, channels, dim=1, **where)
    if not bias and getattr(made, "bias", None) is not None:
        made.register_parameter("bias", None)
    return StepNorm(made)
