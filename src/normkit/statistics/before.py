"""The running statistics as a forward pass found them, for policies that normalise by them in training.

They move at the end of the forward pass. When activation checkpointing runs that forward pass a second time, it has to
find what the first one found.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normkit.statistics.buffers import Kept
from normkit.statistics.policy import State
from normkit.statistics.recomputing import first_pass, recomputing


class Before(State):
    """What the last forward pass outside a backward pass found; not in the ``state_dict``.

    A layer that is called twice before its backward pass, inside one checkpoint, is served the second call's.
    """

    mean: Tensor
    var: Tensor
    batches: Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__()
        for name, source in (
            ("mean", layer.running_mean),
            ("var", layer.running_var),
            ("batches", layer.num_batches_tracked),
        ):
            self.register_buffer(name, torch.zeros_like(source), persistent=False)

    def read(self, kept: Kept) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and number of batches, as copies."""
        now = [t.detach() for t in (kept.mean, kept.var, kept.tracked if kept.tracked is not None else self.batches)]
        held = (self.mean, self.var, self.batches)
        if torch.compiler.is_compiling():
            first = first_pass(kept.var)
            found = now if first is None else [torch.where(first, a, b) for a, b in zip(now, held, strict=True)]
        else:
            found = list(held) if recomputing() else now
        found = [t.clone() for t in found]
        for place, value in zip(held, found, strict=True):
            place.copy_(value)
        return found[0], found[1], found[2]
