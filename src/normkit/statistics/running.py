"""Running and Blend: normalise by the running statistics, in training too, or by a blend with the sample's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from normkit.statistics.application import Application
from normkit.statistics.before import Before
from normkit.statistics.policy import Policy, State, needs_running


@dataclass(frozen=True)
class Running(Policy):
    """Normalise by the running statistics in training too; the batch's moments still enter them, for the next batch.

    The statistics are constants for the gradient. To keep them from moving: :func:`normkit.freeze_` or
    :func:`normkit.statistics_frozen`.

    >>> import torch, normkit as nk
    >>> bn = nk.BatchNorm1d(2, affine=False, eps=0.0001, statistics=nk.statistics.Running())
    >>> x = torch.full((4, 2), 3.0)
    >>> bn(x).round().tolist()[0], bn.running_mean.mul(10).round().tolist()
    ([3.0, 3.0], [3.0, 3.0])
    """

    def check(self, layer: Any) -> None:
        needs_running(self, layer)

    def state(self, layer: Any) -> State:
        return Before(layer)

    def train(self, call: Application) -> Tensor:
        assert call.kept is not None
        mean, var, _ = call.layer.statistics_state.read(call.kept)
        y = call.by_given(mean, var)
        call.observe()
        return y
