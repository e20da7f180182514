"""Taper: from the batch's statistics to the running ones by a gate, as TaperNorm (arXiv:2602.10408) leaves a norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normkit.statistics.application import Application, refuse_single
from normkit.statistics.before import Before
from normkit.statistics.policy import Policy, State, needs_running


@dataclass(frozen=True)
class Taper(Policy):
    """Part of the output normalised by the mini-batch, part by the running statistics, which are constants.

    ``gate * (x - mean) / sqrt(var + eps) + (1 - gate) * (x - running_mean) / sqrt(running_var + eps)``, with the
    running statistics before this batch; the batch's moments enter them as in plain batch norm. The gradient goes
    through the batch's part. At gate 1 this is plain batch norm; at 0 nothing of the batch is left and the layer is an
    affine map, which :func:`normkit.fold` makes part of the layer before it.

    Args:
        gate: share of the mini-batch, from 1 to 0. :class:`normkit.strategies.Taper` moves it during training.

    Raises:
        ValueError: a gate out of range; a layer that keeps no running statistics; one value per channel in training.

    >>> import torch, normkit as nk
    >>> bn = nk.BatchNorm1d(1, affine=False, eps=1e-12, statistics=nk.statistics.Taper(0.5))
    >>> bn(torch.tensor([[1.0], [3.0]])).flatten().round().tolist()      # half of -1, 1 and half of 1, 3
    [0.0, 2.0]

    When not to use it: for good. Its arithmetic is that of torch's operators; it is for the time of the change.

    Source: TaperNorm, arXiv:2602.10408, which does it to layer and RMS norm; here it is done to batch norm.
    """

    gate: float

    def __post_init__(self) -> None:
        if not 0 <= self.gate <= 1:
            raise ValueError(
                f"Taper: gate={self.gate!r}; it is a share.\n  choose it between 1 (the mini-batch alone) and 0 (the "
                "running statistics alone)"
            )

    def check(self, layer: Any) -> None:
        needs_running(self, layer)

    def state(self, layer: Any) -> State:
        return Before(layer)

    def train(self, call: Application) -> Tensor:
        assert call.kept is not None
        refuse_single(call)
        mean, var, _ = call.layer.statistics_state.read(call.kept)
        own, eps = call.measure(), call.layer.eps
        wide = own.mean.dtype
        spread = own.m2 / own.count.clamp(min=1).to(wide)
        by_batch = self.gate * torch.rsqrt(spread + eps)
        by_running = (1 - self.gate) * torch.rsqrt(var.to(wide) + eps)
        factor = by_batch + by_running  # the sum of two scalings, each around its own mean, is one around another mean
        centre = (own.mean * by_batch + mean.to(wide) * by_running) / factor
        return call.by_moments(centre, factor.pow(-2) - eps, observed=own)
