"""Moments(count, mean, m2): the only arithmetic of statistics in normkit.

Measured, merged and exchanged by one rule (Chan, Golub & LeVeque 1983), which never forms E[x²] - E[x]²: at an offset
of 1e4 and a deviation of 1 that difference loses every digit in float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Moments:
    """How many values, their mean, and the sum of their squared deviations from it.

    ``count`` broadcasts against ``mean`` and ``m2``; it is float64, in which every count below 2**53 is exact.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def measure(cls, x: Tensor, axes: tuple[int, ...], mask: Tensor | None = None) -> Moments:
        """Moments over ``axes``, in float32 or better; ``mask`` (True: keep) broadcasts against ``x``.

        The pooled axes are gone from ``mean`` and ``m2``. With no value left, the mean and ``m2`` are 0.
        """
        if not axes:  # torch would take it for all axes
            raise ValueError("Moments.measure: no axis to pool over; name at least one")
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if mask is None:
            pooled = _pooled(x, axes)
            count = torch.full((), pooled, dtype=torch.float64, device=x.device)
            if not pooled:
                empty = x.sum(axes)
                return cls(count, empty, empty)
            mean = x.mean(axes, keepdim=True)
            mean = mean + (x - mean).mean(axes, keepdim=True)  # what the sum lost to rounding, far from 0
            m2 = (x - mean).square().sum(axes)
            return cls(count, _drop(mean, axes), m2)
        keep = mask.expand_as(x)
        count = keep.sum(axes, keepdim=True, dtype=torch.float64)
        x = torch.where(keep, x, 0)
        number = count.clamp(min=1).to(x.dtype)
        mean = x.sum(axes, keepdim=True) / number
        mean = mean + torch.where(keep, x - mean, 0).sum(axes, keepdim=True) / number
        m2 = torch.where(keep, x - mean, 0).square().sum(axes)
        return cls(_drop(count, axes), _drop(mean, axes), m2)

    def merge(self, other: Moments) -> Moments:
        """The moments of both together, wherever their values came from."""
        count = self.count + other.count
        share = (other.count / count.clamp(min=1)).to(self.mean.dtype)
        delta = other.mean - self.mean
        mean = self.mean + delta * share
        m2 = self.m2 + other.m2 + delta.square() * (self.count.to(self.mean.dtype) * share)
        return Moments(count, mean, m2)

    @classmethod
    def merge_all(cls, parts: Iterable[Moments]) -> Moments:
        """The moments of all parts together. Raises ValueError when there is none."""
        parts = iter(parts)
        total = next(parts, None)
        if total is None:
            raise ValueError("Moments.merge_all: nothing to merge; give at least one Moments")
        for part in parts:
            total = total.merge(part)
        return total

    def together(self) -> Moments:
        """The moments of all entries of the first axis together: (n, c) -> (c,), in float64."""
        count, wide = self.count.expand(self.mean.shape), self.mean.double()
        total = count.sum(0)
        mean = (count * wide).sum(0) / total.clamp(min=1)
        m2 = (self.m2 + count * (wide - mean).square()).sum(0)
        return Moments(total, mean, m2)

    def exchange(self, process_group: dist.ProcessGroup | None = None) -> Moments:
        """The moments over all ranks; every rank gets the same. O(channels) bytes whatever the number of ranks.

        Two reductions: counts with means, then the squared deviations around the mean that all now share.
        Not differentiable: for buffers, not for the normalisation of a training step.
        """
        wide = self.mean.detach().double()
        count = self.count.to(wide.device).expand_as(wide)
        sums = torch.stack([count, count * wide])
        dist.all_reduce(sums, group=process_group)
        total, mean = sums[0], sums[1] / sums[0].clamp(min=1)
        m2 = self.m2.detach().double() + count * (wide - mean).square()
        dist.all_reduce(m2, group=process_group)
        return Moments(total, mean.to(self.mean.dtype), m2.to(self.m2.dtype))

    def var(self, correction: int = 0) -> Tensor:
        """Variance; ``correction=1`` is the unbiased one that torch keeps in ``running_var``. 0 / 0 is NaN."""
        return self.m2 / (self.count - correction).clamp(min=0).to(self.m2.dtype)

    def unbiased(self) -> tuple[Tensor, Tensor]:
        """What running statistics take in: the mean and the unbiased variance, cut off from the graph."""
        return self.mean.detach(), Moments(self.count, self.mean, self.m2.detach()).var(1)


def _pooled(x: Tensor, axes: tuple[int, ...]) -> int:
    count = 1
    for axis in axes:
        count *= x.shape[axis]
    return count


def _drop(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Without the axes that ``keepdim`` kept."""
    return x.squeeze(axes)
