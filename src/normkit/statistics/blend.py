"""Blend: in evaluation each sample has a say in its own statistics (Summers & Dinneen 2020, arXiv:1906.03548)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from normkit.statistics.application import Application
from normkit.statistics.policy import Policy, needs_running


@dataclass(frozen=True)
class Blend(Policy):
    """Plain batch norm in training; in evaluation a mixture of the running statistics and the sample's own.

    The paper calls it inference example weighing. With the sample's mean and (biased) variance over space, (n, c)::

        mean = alpha * mean_sample + (1 - alpha) * running_mean
        var  = alpha * var_sample + (1 - alpha) * running_var
               + alpha * (1 - alpha) * (mean_sample - running_mean)**2

    which is the paper's ``alpha * E[x**2] + (1 - alpha) * m_x2 - mean**2``, written so that nothing cancels. What a
    training step does is not changed, nor is the checkpoint: alpha is chosen afterwards, on validation data.

    Args:
        alpha: share of the sample, from 0 (plain batch norm) to 1 (instance norm). The paper finds small ones best.

    Raises:
        ValueError: alpha out of range; a layer that keeps no running statistics.

    >>> import torch, normkit as nk
    >>> bn = nk.BatchNorm1d(1, statistics=nk.statistics.Blend(0.5)).eval()
    >>> bn(torch.tensor([[[1.0, 3.0]]])).square().round().tolist()       # mean 1, variance 0.5 + 0.5 + 0.25 * 2**2 = 2
    [[[0.0, 2.0]]]

    When not to use it: on (n, c), where a sample has one value per channel and its variance is 0; where the level of a
    sample carries what the network is asked for (the blend takes part of it away).

    Source: Summers & Dinneen 2020, arXiv:1906.03548, section 3.1.
    """

    alpha: float

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(
                f"Blend: alpha={self.alpha!r}; it is a share.\n  choose it between 0 (running statistics alone) and 1 "
                "(the sample's alone)"
            )

    def check(self, layer: Any) -> None:
        needs_running(self, layer)

    def evaluate(self, call: Application) -> Tensor:
        assert call.kept is not None
        own, kept, alpha = call.measure(per_sample=True), call.kept, self.alpha
        apart = own.mean - kept.mean
        var = own.m2 / own.count.clamp(min=1).to(own.m2.dtype)
        blended = alpha * var + (1 - alpha) * kept.var + alpha * (1 - alpha) * apart.square()
        return call.by_moments(kept.mean + alpha * apart, blended, observed=None)
