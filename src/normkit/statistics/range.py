"""Range: the distance of greatest and least in the place of the standard deviation (Banner et al. 2018)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from normkit.moments import Moments
from normkit.statistics.application import Application, refuse_single, values_per_channel
from normkit.statistics.policy import Policy


@dataclass(frozen=True)
class Range(Policy):
    """Normalise by the range of the mini-batch: greatest less least, for hardware of few bits.

    ``y = (x - mean) / sqrt(var + eps)`` with ``var = factor(n) * (max(x) - min(x))**2`` over n values per channel. The
    factor makes var, for normal data, what the biased variance is on average, for every n: see :func:`factor`. (The
    paper's ``1 / sqrt(2 ln n)`` for the root of it tends to twice what it should be, and slowly.) So the unbiased var
    enters ``running_var`` as that of a plain layer does, and evaluation is that of a plain layer.

    Raises:
        ValueError: one value per channel in training.

    >>> import torch, normkit as nk
    >>> bn = nk.BatchNorm1d(1, affine=False, eps=1e-12, statistics=nk.statistics.Range())
    >>> bn(torch.tensor([[1.0], [3.0]])).flatten().round(decimals=5).tolist()  # of two values it is plain batch norm
    [-1.0, 1.0]

    When not to use it: to save time on a CPU or GPU; with outliers, one of which sets the scale of its channel; with
    large n, where two values of thousands are looked at and the estimate is much noisier than the standard deviation.

    Source: Banner, Hubara, Hoffer & Soudry 2018, arXiv:1805.11046.
    """

    def train(self, call: Application) -> Tensor:
        if not values_per_channel(call.x):
            return call.by_batch()
        refuse_single(call)
        own = call.measure()
        space = tuple(axis for axis in range(call.x.dim()) if axis != 1)
        apart = call.centred(own.mean)  # 0 where nothing counts, which lies between greatest and least
        var = (apart.amax(space) - apart.amin(space)).square() * factor(own.count).to(own.mean.dtype)
        return call.by_moments(own.mean, var, observed=Moments(own.count, own.mean, var * own.count.to(var.dtype)))


def factor(count: Tensor) -> Tensor:
    """Biased variance / range squared, in expectation over ``count`` normal values: ``(1 - 1 / n) / E[range**2]``."""
    n = count.clamp(min=2)
    return (1 - 1 / n) / expected_square(n)


def expected_square(n: Tensor) -> Tensor:
    """The expected squared range of n >= 2 standard normal values, to 1e-5; elementwise, in float64.

    The range r has the density ``n (n - 1) * integral of phi(x) phi(x + r) (Phi(x + r) - Phi(x))**(n - 2) over x``. All
    of it is smooth and ends in nothing, so the trapezoidal rule with steps of 0.2 does for any n that fits a batch.
    """
    step = 0.2
    x = torch.arange(-10, 5, step, dtype=torch.float64, device=n.device)[:, None]  # the least value
    r = torch.arange(step, 20, step, dtype=torch.float64, device=n.device)
    outside = (torch.special.ndtr(x) + torch.special.ndtr(-x - r)).clamp(max=1 - 2**-53)
    n = n.double()[..., None, None]
    density = n.log() + (n - 1).log() + (n - 2) * torch.log1p(-outside) - (x.square() + (x + r).square()) / 2
    return (density.exp() * r.square()).sum((-2, -1)) * step**2 / (2 * math.pi)
