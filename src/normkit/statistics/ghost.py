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

    The batch is cut into ``round(n / size)`` parts (at least one) that differ by at most one sample; each part is
    normalised by its own mean and (biased) variance, (c,).

    Args:
        size: samples per part. The paper uses 16 to 128 for batches of thousands.

    Raises:
        ValueError: a size below 1; parts that have one value per channel.

    >>> import torch, normkit as nk
    >>> bn = nk.BatchNorm1d(1, affine=False, eps=1e-12, statistics=nk.statistics.Ghost(2))
    >>> bn(torch.tensor([[1.0], [3.0], [10.0], [20.0]])).flatten().round().tolist()
    [-1.0, 1.0, -1.0, 1.0]

    When not to use it: small batches, where the parts are too small to normalise by; batches in which neighbours belong
    together (several views of one image), as neighbours share a part.

    Source: Hoffer, Hubara & Soudry 2017, arXiv:1705.08741. (They let each part into the running statistics by itself;
    the pooled moments are those that evaluation needs.)
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
        return own.together()


def _within(sums: Tensor, parts: int) -> Tensor:
    """Sums over equal parts, at every sample of them."""
    if not parts or not sums.shape[1]:
        return sums
    cut = sums.unflatten(1, (parts, -1))
    return cut.sum(2, keepdim=True).expand_as(cut).flatten(1, 2)
