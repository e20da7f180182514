"""Range: the distance of greatest and least in the place of the standard deviation (Banner et al. 2018)."""

from __future__ import annotations

import functools
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
    """Biased variance / range squared, in expectation over ``count`` normal values of variance 1.

    ``(1 - 1 / n) / E[range**2]``. The expectation is exact to 1e-6 up to n = 64; beyond, it is interpolated between
    values that stand a quarter of an octave apart (to 1e-4), up to n = 2**40.
    """
    numbers, squares = (torch.tensor(row, dtype=count.dtype, device=count.device) for row in _table())
    n = count.clamp(min=2)
    place, knots = n.log().contiguous(), numbers.log()
    above = torch.searchsorted(knots, place).clamp(1, len(numbers) - 1)
    share = (place - knots.take(above - 1)) / (knots.take(above) - knots.take(above - 1))
    return (1 - 1 / n) / torch.lerp(squares.take(above - 1), squares.take(above), share)


@torch.compiler.assume_constant_result  # a compiler takes the numbers, and not the way to them
def _table() -> tuple[tuple[float, ...], tuple[float, ...]]:
    return expected_squares()


@functools.cache
def expected_squares() -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Numbers n, and the expected squared range of n standard normal values for each."""
    numbers = (*range(2, 65), *(int(2 ** (6 + quarter / 4)) for quarter in range(1, 137)))
    return numbers, tuple(expected_square(n) for n in numbers)


def expected_square(n: int) -> float:
    """The expected squared range of n standard normal values, by the trapezoidal rule.

    The range r has the density ``n (n - 1) * integral of phi(x) phi(x + r) (Phi(x + r) - Phi(x))**(n - 2) over x``.
    """
    step = 0.1
    low = torch.arange(-10, 5, step, dtype=torch.float64)[:, None]  # the least value
    apart = torch.arange(step, 20, step, dtype=torch.float64)  # the range
    outside = (torch.special.ndtr(low) + torch.special.ndtr(-low - apart)).clamp(max=1 - 2**-53)
    logarithm = math.log(n) + math.log(n - 1) + (n - 2) * torch.log1p(-outside) - low.square() / 2
    density = (logarithm - (low + apart).square() / 2).exp() / (2 * math.pi)
    return float((density * apart.square()).sum()) * step**2
