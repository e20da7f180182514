"""Ranks: the processes that train one network together, each on its part of every batch (data parallel).

All take the same steps with the same weights: gradients are averaged, and what the first process sees in evaluation is
what all go by. Between these two moments nothing is shared but what a norm shares by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run; by default it is alone, and everything stays as it is."""

    rank: int = 0
    processes: int = 1

    @property
    def alone(self) -> bool:
        return self.processes == 1

    def part(self, batch: Tensor) -> Tensor:
        """The indices of a batch that this process takes; `processes` divides the batch size."""
        return batch.tensor_split(self.processes)[self.rank]

    def average(self, model: nn.Module, loss: float) -> float:
        """Averages gradients in place, and the loss: those of the whole batch, where a loss is a mean over samples."""
        if self.alone:
            return loss
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        together = torch.cat([*(gradient.flatten() for gradient in gradients), torch.tensor([loss])])
        dist.all_reduce(together)
        together /= self.processes
        *averages, average = together.split([*(gradient.numel() for gradient in gradients), 1])
        for gradient, mean in zip(gradients, averages, strict=True):
            gradient.copy_(mean.view_as(gradient))
        return float(average)

    def first(self, *values: float) -> tuple[float, ...]:
        """The first process's numbers, in every process: all decide alike."""
        told = torch.tensor(values, dtype=torch.float64)
        if not self.alone:
            dist.broadcast(told, 0)
        return tuple(told.tolist())

    def total(self, value: float) -> float:
        """The sum over all processes."""
        summed = torch.tensor(value, dtype=torch.float64)
        if not self.alone:
            dist.all_reduce(summed)
        return float(summed)


ALONE = Ranks()
