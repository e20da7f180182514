"""Batch: the statistics of the mini-batch, as the paper has it (Ioffe & Szegedy 2015, arXiv:1502.03167)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from normkit import epilogue
from normkit.statistics.application import Application, values_per_channel
from normkit.statistics.policy import Policy

Single = Literal["error", "running", "skip"]


@dataclass(frozen=True)
class Batch(Policy):
    """Normalise by the mini-batch; its moments enter the running statistics. The default.

    Args:
        on_single: what to do with a batch that has one value per channel, as the last of an epoch may have:
            ``"error"`` as torch does, ``"running"`` normalise by the running statistics and leave them, ``"skip"``
            leave the input as it is (residual and activation follow). It is the shape that counts: a mask that leaves
            one value gives the bias, and moves nothing.

    Raises:
        ValueError: an unknown word; one value per channel with ``"error"``; ``"running"`` without running statistics.

    >>> import torch, normkit as nk
    >>> bn = nk.BatchNorm1d(2, statistics=nk.statistics.Batch(on_single="running"))
    >>> bn(torch.ones(1, 2)).shape
    torch.Size([1, 2])

    When not to use it: see :class:`normkit.BatchNorm2d`; what to use then: the page on statistics.

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167.
    """

    on_single: Single = "error"

    def __post_init__(self) -> None:
        if self.on_single not in get_args(Single):
            raise ValueError(
                f"Batch: on_single={self.on_single!r} is unknown.\n  choose from: {', '.join(get_args(Single))}"
            )

    def train(self, call: Application) -> Tensor:
        if self.on_single == "error" or values_per_channel(call.x) != 1:
            return call.by_batch()
        if self.on_single == "skip":
            return call.masked(epilogue.apply(call.x, call.residual, call.layer.activation))
        if call.kept is None:
            raise ValueError(
                f"{type(call.layer).__name__}: on_single='running', and the layer keeps no running statistics.\n"
                "  leave track_running_stats=True, or choose on_single='skip'"
            )
        return call.by_given(call.kept.mean, call.kept.var)


PLAIN = Batch()
"""What every batch norm does that was not told otherwise."""
