"""L1: the mean absolute deviation in the place of the standard deviation (Wu et al. 2018, arXiv:1802.09769)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from normkit.moments import Moments
from normkit.statistics.application import Application, refuse_single, values_per_channel
from normkit.statistics.policy import Policy


@dataclass(frozen=True)
class L1(Policy):
    """Normalise by the mean absolute deviation of the mini-batch: no squares, for hardware of few bits.

    ``y = (x - mean) / sqrt(var + eps)`` with ``var = factor(n) * mean(abs(x - mean))**2`` over n values per channel.
    The factor makes var, for normal data, what the biased variance is on average; it goes to pi / 2 (the paper's
    ``sqrt(pi / 2)``, squared) as n grows and is exact for every n: see :func:`factor`. So the unbiased var enters
    ``running_var`` as that of a plain layer does, and evaluation is that of a plain layer.

    Raises:
        ValueError: one value per channel in training.

    >>> import torch, normkit as nk
    >>> bn = nk.BatchNorm1d(1, affine=False, eps=1e-12, statistics=nk.statistics.L1())
    >>> bn(torch.tensor([[1.0], [3.0]])).flatten().tolist()                   # of two values it is plain batch norm
    [-1.0, 1.0]

    When not to use it: to save time on a CPU or GPU; torch's operators here are slower than the kernels of plain batch
    norm. Where values are far from normal (after a ReLU, with outliers) its scale differs from the standard deviation.

    Source: Wu, Li, Deng, Wang, Yang & Li 2018, arXiv:1802.09769 (L1 batch normalization).
    """

    def train(self, call: Application) -> Tensor:
        if not values_per_channel(call.x):
            return call.by_batch()
        refuse_single(call)
        own = call.measure()
        space = tuple(axis for axis in range(call.x.dim()) if axis != 1)
        deviation = call.centred(own.mean).abs().sum(space) / own.count.clamp(min=1).to(own.mean.dtype)
        var = deviation.square() * factor(own.count).to(own.mean.dtype)
        return call.by_moments(own.mean, var, observed=Moments(own.count, own.mean, var * own.count.to(var.dtype)))


def factor(count: Tensor) -> Tensor:
    """Biased variance / mean absolute deviation squared, in expectation over ``count`` normal values.

    ``pi n / (2 (pi / 2 + sqrt(n (n - 2)) + asin(1 / (n - 1))))``: from the second moment of the mean deviation, which
    Helmert (1876) found exactly. 1 for n = 2, where both are half the distance; pi / 2 in the limit.
    """
    n = count.clamp(min=2)
    return math.pi * n / (2 * (math.pi / 2 + torch.sqrt(n * (n - 2)) + torch.asin(1 / (n - 1))))
