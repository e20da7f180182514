"""PerStep: statistics of their own for every time step of a recurrent network (Cooijmans et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normkit.moments import Moments
from normkit.statistics.application import Application, values_per_channel
from normkit.statistics.buffers import Kept
from normkit.statistics.pooling import Pooling
from normkit.statistics.table import ByRow, Table, running


@dataclass(frozen=True)
class PerStep(ByRow):
    """Normalise by the mini-batch at this time step; every step keeps running statistics of its own: ``bn(x, step=t)``.

    In training mean and (biased) variance are those of the rows given at step t, or of those that ``mask`` keeps: (n,)
    on an input of (n, c). A step with fewer than two values per channel is normalised by its running statistics, which
    it leaves as they are. Steps from ``max_length`` on share the last step's statistics, in training and in evaluation.
    The layer's own running statistics go on over all steps; they serve a step that no batch has reached yet.

    Args:
        max_length: how many steps have statistics of their own: the longest sequence of the training data.

    Raises:
        ValueError: a length below 1; a call without ``step=``, or with a negative one; a layer that keeps no running
            statistics.
        TypeError: a step that is no integer.

    >>> import torch, normkit as nk
    >>> bn = nk.BatchNorm1d(2, momentum=1.0, statistics=nk.statistics.PerStep(3))
    >>> for t in range(4):
    ...     y = bn(torch.tensor([[0.0, t], [2.0, t]]), step=t)
    >>> bn.statistics_state.mean.tolist()                              # the fourth step shares the third's place
    [[1.0, 0.0], [1.0, 1.0], [1.0, 3.0]]

    The paper starts with a weight of 0.1 instead of 1, so that gradients do not vanish: ``bn.weight.data.fill_(0.1)``.

    When not to use it: where the statistics do not change along the sequence (one set for all is estimated from more
    data), and in transformers, whose positions are no steps; layer norm needs no statistics at all.

    Source: Cooijmans, Ballas, Laurent, Gülçehre & Courville 2017, arXiv:1603.09025.
    """

    max_length: int

    def __post_init__(self) -> None:
        if not isinstance(self.max_length, int) or self.max_length < 1:
            raise ValueError(f"PerStep: max_length={self.max_length!r}; it is a number of steps, 1 or more")

    def state(self, layer: Any) -> Table:
        return Table(layer, self.max_length)

    def kept(self, layer: Any, step: int | None) -> Kept | None:
        name = type(layer).__name__
        if step is None:
            raise ValueError(f"{name}: statistics={self!r} needs to know the time step.\n  call it as bn(x, step=t)")
        if not isinstance(step, int | torch.SymInt) or isinstance(step, bool):
            raise TypeError(f"{name}: step={step!r} is no integer.\n  give the index of the time step, from 0 on")
        if step < 0:
            raise ValueError(f"{name}: step={step}; time steps are counted from 0 on")
        return layer.statistics_state.kept(layer, min(step, self.max_length - 1))

    def train(self, call: Application) -> Tensor:
        if call.mask is not None:
            return call.pooled(Enough(*running(call)))
        if 0 < values_per_channel(call.x) < 2:
            return self.evaluate(call)
        return call.by_batch()


class Enough(Pooling):
    """The batch's moments, where it has two values or more; otherwise the given ones, which are constants."""

    def __init__(self, mean: Tensor, var: Tensor) -> None:
        self.mean, self.var = mean, var
        self.few: Tensor = torch.empty(0)

    def total(self, sums: Tensor) -> Tensor:
        """(k, c); of the gradients alone: nothing flows to a constant."""
        return torch.where(self.few, 0, sums)

    def merge(self, own: Moments) -> Moments:
        count = own.count.expand(own.mean.shape)
        self.few = count < 2
        m2 = (self.var * count.clamp(min=1)).to(own.m2.dtype)
        mean = torch.where(self.few, self.mean.to(own.mean.dtype), own.mean)
        return Moments(count, mean, torch.where(self.few, m2, own.m2))

    def observed(self, own: Moments, merged: Moments) -> Moments:
        """The batch's: of one value it has no variance, and so nothing moves."""
        return own
