"""Batch renormalization (Ioffe 2017, arXiv:1702.03275)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from normkit.moments import Moments
from normkit.statistics.application import Application
from normkit.statistics.before import Before
from normkit.statistics.policy import Policy, State, needs_running
from normkit.statistics.pooling import Whole


@dataclass(frozen=True)
class Renorm(Policy):
    """Normalise by the batch, then correct towards the running statistics, within bounds that open during training.

    ``hat * r + d`` with ``r = clip(s_batch / s_running, 1 / r_max, r_max)`` and ``d = clip((mean_batch - mean_running)
    / s_running, -d_max, d_max)``, where s is ``sqrt(var + eps)``; r and d are constants for the gradient. As in the
    paper, the first ``warmup`` updates are plain batch norm; then ``d_max`` opens linearly until update 5 * warmup, and
    ``r_max`` until 8 * warmup. Updates are counted by ``num_batches_tracked``, so the schedule goes on where a
    checkpoint left it.

    Args:
        r_max: final bound of r, 1 or more.
        d_max: final bound of d, 0 or more.
        warmup: updates of plain batch norm; the paper's 5000 are for runs of 100,000s of steps.

    Raises:
        ValueError: bounds out of range; a layer that keeps no running statistics.

    >>> import torch, normkit as nk
    >>> bn = nk.BatchNorm1d(4, statistics=nk.statistics.Renorm(warmup=0))
    >>> bn(torch.randn(4, 4) + 3).mean().item() > 1          # the running mean is still 0: the offset comes through
    True

    When not to use it: with a momentum that is too great for small batches (the running statistics it corrects towards
    are then as noisy as the batch's; the paper uses 0.01), and where batches are large: nothing is to be corrected.

    Source: Ioffe 2017, arXiv:1702.03275.
    """

    r_max: float = 3.0
    d_max: float = 5.0
    warmup: int = 5000

    def __post_init__(self) -> None:
        if self.r_max < 1 or self.d_max < 0 or self.warmup < 0:
            raise ValueError(
                f"Renorm: r_max={self.r_max}, d_max={self.d_max}, warmup={self.warmup}.\n"
                "  r_max is 1 or more (1 allows no correction), d_max and warmup are 0 or more"
            )

    def check(self, layer: Any) -> None:
        needs_running(self, layer)

    def state(self, layer: Any) -> State:
        return Before(layer)

    def train(self, call: Application) -> Tensor:
        assert call.kept is not None
        mean, var, batches = call.layer.statistics_state.read(call.kept)
        deviation = (var + call.layer.eps).sqrt()
        r_max, d_max = self.bounds(batches)

        def correct(merged: Moments) -> tuple[Tensor, Tensor]:
            own = (merged.m2.detach() / merged.count.clamp(min=1)).to(var.dtype) + call.layer.eps
            r = own.sqrt() / deviation
            d = (merged.mean.detach().to(mean.dtype) - mean) / deviation
            return r.clamp(1 / r_max, r_max), d.clamp(-d_max, d_max)

        return call.pooled(Whole(), correct=correct)

    def bounds(self, batches: Tensor) -> tuple[Tensor, Tensor]:
        """r_max and d_max after so many updates; tensors, so that nothing waits for the counter."""
        after = (batches - self.warmup).clamp(min=0).double()
        opened = lambda updates: (after / max(updates, 1)).clamp(max=1) if self.warmup else after * 0 + 1
        return 1 + (self.r_max - 1) * opened(7 * self.warmup), self.d_max * opened(4 * self.warmup)
