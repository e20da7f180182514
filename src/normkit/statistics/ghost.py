"""Ghost batches: a large batch normalised in parts (Hoffer, Hubara & Soudry 2017, arXiv:1705.08741)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normkit.moments import Moments
from normkit.statistics.application import Application
from normkit.statistics.policy import Policy
from normkit.statistics.pooling import Pooling


@dataclass(frozen=True)
class Ghost(Policy):
    """Normalise neighbouring samples in parts of about ``size``; the moments of the whole batch enter the running
    statistics. In evaluation nothing differs from plain batch norm.

    The batch is cut into ``round(n / size)`` parts (at least one) that differ by at most one sample.

    Args:
        size: samples per part. The paper uses 16 to 128 for batches of thousands.

    Raises:
        ValueError: a size below 1; parts that have one value per channel.
    """

    size: int

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"Ghost: size={self.size!r}; it is the number of samples of a part, 2 or more on (n, c)")

    def train(self, call: Application) -> Tensor:
        parts = Parts(call.x.shape[0], self.size)
        if parts.smallest * call.x.shape[2:].numel() < 2 and call.x.shape[0]:
            raise ValueError(
                f"Ghost: {call.x.shape[0]} samples in {parts.count} parts leave parts of one value per channel, which "
                f"has no deviation.\n  input {tuple(call.x.shape)}, size={self.size}; choose a greater size"
            )
        return call.pooled(parts)


@dataclass
class Parts(Pooling):
    """Neighbouring samples; the first parts have one more where the batch does not divide."""

    samples: int
    size: int
    per_sample = True

    @property
    def count(self) -> int:
        return max(1, (self.samples + self.size // 2) // self.size)

    @property
    def smallest(self) -> int:
        return self.samples // self.count

    def total(self, sums: Tensor) -> Tensor:
        """(k, n, c)."""
        longer = self.samples % self.count
        border = longer * (self.smallest + 1)
        head, tail = sums[:, :border], sums[:, border:]
        return torch.cat([_within(head, longer), _within(tail, self.count - longer)], 1)

    def observed(self, own: Moments, merged: Moments) -> Moments:
        """Of the whole batch: the spread between the parts is in it."""
        count = own.count.expand(own.mean.shape)
        total = count.sum(0)
        mean = (count * own.mean).sum(0) / total.clamp(min=1)
        m2 = (own.m2 + count * (own.mean - mean).square()).sum(0)
        return Moments(total, mean, m2)


def _within(sums: Tensor, parts: int) -> Tensor:
    """Sums over equal parts, at every sample of them."""
    if not parts or not sums.shape[1]:
        return sums
    cut = sums.unflatten(1, (parts, -1))
    return cut.sum(2, keepdim=True).expand_as(cut).flatten(1, 2)
