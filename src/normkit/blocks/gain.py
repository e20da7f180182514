"""What an activation does to the deviation of a standard normal input, and the number that undoes it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from normkit.epilogue import Activation, activation_module

POINTS, FAR = 200_001, 12.0
"""A grid of so many points up to so many deviations: the gains of kinked and of smooth functions to 9 digits."""


def activation_gain(activation: Activation | type[nn.Module]) -> float:
    """The number that brings ``activation(z)`` back to variance 1, where z is standard normal.

    ``gain = 1 / sqrt(Var[activation(z)])``, by quadrature: any elementwise function has one.

    Args:
        activation: a name, a module or its class, a function, or ``None``.

    Raises:
        ValueError: an unknown name; a function whose output does not vary.

    >>> import normkit as nk
    >>> round(nk.blocks.activation_gain("relu"), 4)
    1.7129

    The numbers in the code of the paper (relu 1.71396) come from random samples and are off by up to 0.1 %.

    Source: Brock, De & Smith 2021, arXiv:2101.08692.
    """
    apply: Callable[[Tensor], Tensor] | None
    named = isinstance(activation, (str, type)) or activation is None
    apply = activation_module(activation) if named else activation  # type: ignore[assignment]
    z = torch.linspace(-FAR, FAR, POINTS, dtype=torch.float64)
    weights = torch.exp(-z.square() / 2)
    weights /= weights.sum()
    with torch.no_grad():
        y = z.clone() if apply is None else apply(z.clone())
    variance = (weights * (y - (weights * y).sum()).square()).sum().item()
    if not variance > 0:
        raise ValueError(f"activation_gain: the output of {activation!r} does not vary (variance {variance:g})")
    return 1.0 / math.sqrt(variance)
