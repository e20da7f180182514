"""Call: one application of a norm, with all that a backend may need to know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normkit import epilogue
from normkit.layout import solve
from normkit.vocabulary.problem import Problem
from normkit.vocabulary.spec import Spec


def nobody() -> Tensor:
    """In the place of torch's operators, where it is settled that kernels run."""
    raise AssertionError("the kernels have been chosen, or nothing has")


@dataclass
class Call:
    """One application of a norm: all that a backend may need to know."""

    spec: Spec
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    by_torch: Callable[[], Tensor]
    """The norm by torch's own operators, without the epilogue; it moves the running statistics in place."""
    eps: Any = 0.0
    """A number; where it is learned a tensor, and torch's operators compute (:attr:`composite`)."""
    over: str | None = None
    """The pattern, where it differs from the spec's (channels-first layer norm)."""
    groups: int = 1
    trailing: int = 1
    sizes: tuple[int, ...] | None = None
    """Of the axes that carry the weight, where the caller names them: an input that differs is an error."""
    residual: Tensor | None = None
    activation: epilogue.Activation = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    moved: tuple[Tensor, Tensor] | None = None
    """Where the running statistics go that have moved; ``None``: over themselves."""
    batch_statistics: bool = True
    momentum: float = 0.0
    save_output: bool = False
    """Keep the output for the backward pass, not the input."""
    reference: Callable[[], Tensor] | None = None
    """The exact arithmetic of a norm that pools nothing; ``None``: the pattern says it."""
    counted: Tensor | None = None
    """Broadcasts against the input: which values enter the statistics; ``None``: all."""
    merged: bool = False
    """The moments are merged with others before they normalise: kernels run in two halves (:func:`phases`)."""
    composite: bool = False
    """What normalises is worked out by torch's operators alone, and so is the rest."""
    plan: Any = None
    """What a kernel that has no reason against the call has looked up for it."""

    def __post_init__(self) -> None:
        if self.over is None:
            self.over = self.spec.over

    def problem(self) -> Problem | None:
        """What a kernel sees; ``None`` for a norm that pools nothing."""
        if self.over is None:
            return None
        layout = solve(self.over, tuple(self.x.shape), groups=self.groups, trailing=self.trailing)
        tensors = (self.x, self.weight, self.bias, self.residual)
        return Problem(
            kind="channels" if 0 in layout.pooled and self.x.dim() > 1 and 0 not in layout.weighted else "rows",
            shape=tuple(self.x.shape),
            strides=tuple(self.x.stride()),
            view=layout.view,
            pooled=layout.pooled,
            weighted=layout.weighted,
            dtype=str(self.x.dtype).removeprefix("torch."),
            weight_dtype=None if self.weight is None else str(self.weight.dtype).removeprefix("torch."),
            device=self.x.device.type,
            center=self.spec.center,
            training=self.batch_statistics,
            activation=epilogue.fusible(self.activation)[0],
            residual=self.residual is not None,
            grad=torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors),
        )
