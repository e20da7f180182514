"""Step: what those see who act between two optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Step:
    """One optimizer step that has just been taken; the gradients that made it are still in the parameters.

    number: from 1. total: steps of the whole run. loss: of this step's batch, before the step.
    """

    number: int
    total: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    inputs: Any
    targets: Tensor
    loss: float
