"""What a norm is invariant to. Each law is a function (layer, x) -> residual: 0 where the law holds.

A norm claims the laws it obeys in its spec, and claims by silence that it breaks the others. Tests hold both: a
claimed law has no residual on any input, an unclaimed one is broken by a witness. The table in the docs is printed
from the same claims, so that no cell of it can be wrong without a red test.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normkit.vocabulary.spec import LAWS as NAMES

Residual = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Law:
    """One invariance."""

    name: str
    statement: str
    """In one line, for the reader of a table."""
    residual: Residual
    """(layer in training mode, x of shape (n, c, s...)) -> greatest deviation, relative to the size of the output."""


def _deviation(got: Tensor, wanted: Tensor) -> Tensor:
    return (got - wanted).abs().max() / wanted.abs().max().clamp(min=torch.finfo(wanted.dtype).tiny)


def _factors(x: Tensor, axis: int, low: float = 0.5, high: float = 3.0) -> Tensor:
    """Different numbers along one axis, the same along the others."""
    shape = [1] * x.dim()
    shape[axis] = x.shape[axis]
    return torch.linspace(low, high, x.shape[axis], dtype=x.dtype, device=x.device).reshape(shape)


def _scaled(factors: Callable[[Tensor], Tensor | float]) -> Residual:
    return lambda norm, x: _deviation(norm(x * factors(x)), norm(x))


def _shifted(offsets: Callable[[Tensor], Tensor | float]) -> Residual:
    return lambda norm, x: _deviation(norm(x + offsets(x)), norm(x))


def _independent(axis: int) -> Residual:
    """Changing one slice along ``axis`` must leave the output of all others as it was."""

    def residual(norm: nn.Module, x: Tensor) -> Tensor:
        changed = x.clone()
        changed.select(axis, 0).mul_(-2.0).add_(1.0)
        others = torch.arange(1, x.shape[axis], device=x.device)
        return _deviation(norm(changed).index_select(axis, others), norm(x).index_select(axis, others))

    return residual


def _restores(norm: nn.Module, x: Tensor) -> Tensor:
    """Set weight and bias to the deviation and the mean over the axes that carry no weight; the input comes back."""
    norm = copy.deepcopy(norm)
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    axes = tuple(axis for axis in range(x.dim()) if axis != 1)
    with torch.no_grad():
        if weight is not None:
            weight.copy_((x.var(axes, correction=0) + getattr(norm, "eps", 0.0)).sqrt())
        if bias is not None:
            bias.copy_(x.mean(axes))
        return _deviation(norm(x), x)


_RESIDUALS: dict[str, tuple[str, Residual]] = {
    "scale": ("the input times a number", _scaled(lambda x: 3.0)),
    "shift": ("the input plus a number", _shifted(lambda x: 3.0)),
    "sample_scale": ("each sample times its own number", _scaled(lambda x: _factors(x, 0))),
    "sample_shift": ("each sample plus its own number", _shifted(lambda x: _factors(x, 0))),
    "channel_scale": ("each channel times its own number", _scaled(lambda x: _factors(x, 1))),
    "channel_shift": ("each channel plus its own number", _shifted(lambda x: _factors(x, 1))),
    "sample": ("what the other samples are", _independent(0)),
    "channel": ("what the other channels are", _independent(1)),
    "restores": ("with weight = sqrt(var + eps) and bias = mean it gives back its input", _restores),
}

LAWS: dict[str, Law] = {name: Law(name, *_RESIDUALS[name]) for name in NAMES}
