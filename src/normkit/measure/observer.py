"""Observer: what a family of quantities has to say about one call of one module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normkit.vocabulary.quantity import Quantity

Numbers = Mapping[str, Tensor]
"""By quantity, a tensor of no axes: nobody waits for its value."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One call of a module. ``output`` is ``None`` before it."""

    module: nn.Module
    args: tuple
    kwargs: Mapping[str, Any]
    output: Any = None
    cast: tuple[str, torch.dtype] | None = None
    """The autocast that it is called under: type of the device, and the type that is cast to."""

    @property
    def input(self) -> Tensor | None:
        """The first tensor that the module is given; by name, that which torch's layers call ``input``."""
        values = (*self.args, self.kwargs.get("input"), *self.kwargs.values())
        return next((value for value in values if isinstance(value, Tensor)), None)


@dataclass(frozen=True, slots=True)
class Observer:
    """Quantities that are read from the same call."""

    quantities: tuple[Quantity, ...]
    listens_to: Callable[[nn.Module], bool]
    before: bool
    """Reads before the module has run (what it may write over), or after."""
    read: Callable[[Seen, frozenset[str]], Numbers]
    """Of the quantities in the set, those that this call has."""
