"""Which units share their statistics, and what that makes of moments and of gradients.

A unit is what is measured by itself: a channel, or a channel of one sample. Everything that merges moments (ghost
batches, ranks, masked samples) is one linear map: the sums over the units that belong together, at every unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.moments import Moments


class Pooling:
    """Every unit by itself. Subclasses say in :meth:`total` who belongs together."""

    per_sample = False
    """Units are (n, c), channels of single samples; otherwise (c,)."""

    def total(self, sums: Tensor) -> Tensor:
        """(k, units...) -> the same shape: at every unit the sum over all units that share with it.

        Linear and differentiable; run once per forward and once per backward pass.
        """
        return sums

    def merge(self, own: Moments) -> Moments:
        """The moments that normalise each unit, from those measured in it. Differentiable; in float64."""
        count = own.count.expand(own.mean.shape)
        mean = own.mean.double()
        total, sums = self.total(torch.stack([count, count * mean]))
        together = sums / total.clamp(min=1)
        (m2,) = self.total((own.m2.double() + count * (mean - together).square())[None])
        return Moments(total, together, m2)

    def observed(self, own: Moments, merged: Moments) -> Moments:
        """What enters the running statistics, (c,); nothing of it is differentiated."""
        return merged


class Whole(Pooling):
    """The batch of this process: plain batch norm."""

    def merge(self, own: Moments) -> Moments:
        return own
