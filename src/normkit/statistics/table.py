"""Running statistics of their own for every step or domain, beside those of all together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normkit.statistics.application import Application
from normkit.statistics.buffers import Kept
from normkit.statistics.policy import Policy, State, needs_running


class Table(State):
    """One row of running statistics per step or domain.

    The layer's own go on beside them, over all rows, as those of a plain layer would: they are what a plain layer
    loads, and what serves a row that no batch has reached yet.
    """

    mean: Tensor
    """(rows, c)."""
    var: Tensor
    batches: Tensor
    """(rows,): how many batches went in."""
    values: Tensor

    def __init__(self, layer: Any, rows: int) -> None:
        super().__init__()
        self.register_buffer("mean", layer.running_mean.detach().repeat(rows, 1))
        self.register_buffer("var", layer.running_var.detach().repeat(rows, 1))
        self.register_buffer("batches", layer.num_batches_tracked.new_zeros(rows))
        self.register_buffer("values", layer.num_batches_tracked.new_zeros(rows), persistent=False)

    def kept(self, layer: Any, row: int) -> Kept | None:
        """The statistics of one row; its moments enter the layer's own as well."""
        together = layer.kept()
        return Kept(
            self.mean[row],
            self.var[row],
            layer.momentum,
            self.batches[row],
            values=self.values[row],
            held=together.held,
            pending=together.pending,
            key=row,
            also=together,
        )

    def begin(self, layer: Any) -> None:
        """Every row starts where the plain layer stood."""
        self.mean.copy_(layer.running_mean.expand_as(self.mean))
        self.var.copy_(layer.running_var.expand_as(self.var))
        self.batches.copy_(layer.num_batches_tracked.expand_as(self.batches))
        self.values.zero_()

    def reset(self) -> None:
        """As new."""
        self.mean.zero_()
        self.var.fill_(1)
        self.batches.zero_()
        self.values.zero_()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.values.zero_()  # a checkpoint tells of batches only


@dataclass(frozen=True)
class ByRow(Policy):
    """What the policies with a table share."""

    def check(self, layer: Any) -> None:
        needs_running(self, layer)

    def evaluate(self, call: Application) -> Tensor:
        return call.by_given(*running(call))


def running(call: Application) -> tuple[Tensor, Tensor]:
    """Mean and variance of the call's row; of all rows together, where no batch has reached this one."""
    row = call.kept
    assert row is not None
    assert row.also is not None
    assert row.tracked is not None
    reached = row.tracked > 0
    return torch.where(reached, row.mean, row.also.mean), torch.where(reached, row.var, row.also.var)
