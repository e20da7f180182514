"""Running: normalise by the running statistics in training too."""

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

    ``(x - running_mean) / sqrt(running_var + eps)``, with the statistics before this batch, which are constants for the
    gradient. To keep them from moving: :func:`normkit.freeze_` or :func:`normkit.statistics_frozen`.

    Raises:
        ValueError: a layer that keeps no running statistics.

    >>> import torch, normkit as nk
    >>> bn = nk.BatchNorm1d(2, affine=False, eps=0.0001, statistics=nk.statistics.Running())
    >>> x = torch.full((4, 2), 3.0)
    >>> bn(x).round().tolist()[0], bn.running_mean.mul(10).round().tolist()
    ([3.0, 3.0], [3.0, 3.0])

    When not to use it: from the start of training, when the running statistics lag behind weights that change fast:
    nothing then holds the activations, and training may diverge. It is for fine-tuning and for the end of a run.

    Source: discussed in Ioffe & Szegedy 2015, arXiv:1502.03167, section 3.1, which warns of it for the same reason.
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
