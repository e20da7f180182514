"""The tensors of one cell. Never plain normal numbers: those are normalised already and hide mistakes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normkit.bench.cases import Case

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass
class Inputs:
    """What every peer of a cell gets: the same tensors."""

    x: Tensor
    residual: Tensor | None
    upstream: Tensor
    """The gradient that arrives at the output."""

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients are taken for, besides the parameters."""
        return [tensor for tensor in (self.x, self.residual) if tensor is not None]


def inputs(case: Case, dtype: str, layout: str, device: str = "cpu", seed: int = 0) -> Inputs:
    """Off-centre and off-scale, with one outlier; as leaves that want gradients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float, offset: float) -> Tensor:
        values = torch.empty(case.shape).normal_(offset, scale, generator=generator)
        return values.to(device, getattr(torch, dtype), memory_format=_memory_format(case, layout))

    x = draw(2.0, 1.5)
    x[(0,) * x.dim()] = 30.0
    residual = draw(1.5, -0.5).requires_grad_() if case.residual else None
    return Inputs(x.requires_grad_(), residual, draw(1.0, 0.1))


def weight_dtype(case: Case, dtype: str) -> str:
    """Of the parameters: float32 for norms of images (autocast leaves them so), the input's for norms of features."""
    per_feature = case.spec.name in ("layer_norm", "rms_norm", "dyt")
    return dtype if per_feature or dtype == "float64" else "float32"


def _memory_format(case: Case, layout: str) -> torch.memory_format:
    return FORMATS[len(case.shape)] if layout == "channels_last" else torch.contiguous_format
