"""Launches of ``triton_wide``: rows that are too few to fill a GPU, and wider than a tile."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from normkit.kernels import contract, triton_launch, triton_wide
from normkit.kernels.triton_launch import MOST_PARTS, PROGRAMS, Epilogue, gradients_of, parts_of, tile_of

MOST_ROWS = 16
"""In a tile, so that 256 features of each are neighbours: 512 bytes."""


class WideRows:
    """``rows`` as ``Rows`` has them, split along the features; with the same methods."""

    def __init__(self, work: contract.Work, dtype: torch.dtype, epilogue: Epilogue, center: bool, device: torch.device):
        self.work, self.epilogue = work, epilogue
        self.statistics = rows = work.n
        self.bits = contract.bits_needed(work) if epilogue.keeps_bits else 0
        self.warps = 8
        self.BR = min(parts_of(rows), MOST_ROWS)
        self.BF = max(16, tile_of(dtype) // self.BR)
        self.blocks, tiles = triton.cdiv(rows, self.BR), triton.cdiv(work.c, self.BF)
        wanted = triton.cdiv(PROGRAMS * triton_launch.processors(device), self.blocks)
        per = triton.cdiv(tiles, min(MOST_PARTS, wanted, tiles))
        self.parts = triton.cdiv(tiles, per)
        self.programs = (self.blocks, self.parts)
        self._place = (rows, work.c, per * self.BF, self.parts, rows * self.parts)
        self.constants = {"BR": self.BR, "BF": self.BF, "WIDE": rows * work.c >= 2**31}
        self._center, self._activation = {"CENTER": center}, {"ACTIVATION": epilogue.activation}
        self._merging = {"PARTS": parts_of(self.parts)}

    def forward(
        self, x: Tensor, residual: Any, weight: Any, bias: Any, running: Any, moved: Any, momentum: float, eps: float,
        bits: Tensor | None, *, summed: Tensor | None = None, before: bool = False, offset: float = 0.0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The output and the statistics; ``before``: the residual is added to the input, and ``summed`` receives it."""
        y = torch.empty_like(x)
        stats = torch.empty(2 * self.statistics, dtype=torch.float32, device=x.device)
        partials = self._partials(3, x)
        common = {**self._center, **self.constants, "PRE": before, "num_warps": self.warps}
        triton_launch.launch(triton_wide.measure, self.programs, x, residual, partials, *self._place, **common)
        triton_launch.launch(
            triton_wide.normalise, self.programs,
            x, residual, weight, bias, y, bits, stats, summed, partials,
            *self._place, eps, self.epilogue.slope, offset, **self._activation, **self._merging, **common,
        )  # fmt: skip
        return y, stats

    def backward(
        self, x: Tensor, dy: Tensor, residual: Any, weight: Any, bias: Any, stats: Tensor, bits: Any,
        need: tuple[bool, bool, bool, bool], *, dsummed: Tensor | None = None, offset: float = 0.0,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        """Gradients of x, weight, bias and residual: those that are needed. ``dsummed``: more that arrives at x."""
        need_x, need_weight, need_bias, need_residual = need
        through = need_residual and self.epilogue.activation is not None
        dx = torch.empty_like(x) if need_x else None
        dresidual = torch.empty_like(x) if through else None
        partials, own = self._partials(2, x), None
        if need_weight or need_bias:
            own = torch.empty(2, self.blocks, self.work.c, dtype=torch.float32, device=x.device)
        given, numbers = (x, dy, residual, weight, bias, bits, stats, partials), (self.epilogue.slope, offset)
        common = {**self._activation, **self.constants, "num_warps": self.warps}
        if own is not None or dx is not None:
            triton_launch.launch(
                triton_wide.sum_up, self.programs, *given,
                own[0] if own is not None and need_weight else None,
                own[1] if own is not None and need_bias else None,
                *self._place, *numbers, **common,
            )  # fmt: skip
        if dx is not None or dresidual is not None:
            triton_launch.launch(
                triton_wide.differentiate, self.programs, *given, dsummed, dx, dresidual,
                *self._place, *numbers, **self._center, **self._merging, **common,
            )  # fmt: skip
        parameters = (None, None) if own is None else gradients_of(own, weight, bias, (need_weight, need_bias))
        return dx, *parameters, dresidual if through else (dy if need_residual else None)

    def _partials(self, count: int, x: Tensor) -> Tensor:
        return torch.empty(count, self.statistics, self.parts, dtype=torch.float32, device=x.device)
