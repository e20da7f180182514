"""Launches of ``triton_wide``: rows that are wider than a tile, or too few to fill a GPU."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from normkit.kernels import contract, triton_launch, triton_wide
from normkit.kernels.triton_launch import Epilogue, Launch, Pace, Total, parts_of

PACE = Pace(4096, 8, 1, 4)
MOST_ROWS = 2
"""In a tile."""
MERGED = 4096
"""Parts of rows that every program of the second pass merges, at most: a tile of them."""


class WideRows:
    """``rows`` as ``Rows`` has them, split along the features; with the same methods."""

    def __init__(self, work: contract.Work, dtype: torch.dtype, epilogue: Epilogue, center: bool, device: torch.device):
        self.work, self.epilogue, self.center = work, epilogue, center
        self.statistics = rows = work.n
        self.bits = contract.bits_needed(work) if epilogue.keeps_bits else 0
        self.BR = min(parts_of(rows), MOST_ROWS)
        self.BF = max(16, PACE.elements(dtype) // self.BR)
        self.blocks, tiles = triton.cdiv(rows, self.BR), triton.cdiv(work.c, self.BF)
        wanted = triton.cdiv(PACE.programs * triton_launch.processors(device), self.blocks)
        per = triton.cdiv(tiles, min(MERGED // self.BR, wanted, tiles))
        self.parts = triton.cdiv(tiles, per)
        self._place = (rows, work.c, per * self.BF, self.parts, rows * self.parts)
        self.total = Total(self.blocks, work.c)
        self.prepare()

    def prepare(self, warps: float = 1.0) -> None:
        """The launches; ``warps``: so many times as many as usual."""
        follows = {"ACTIVATION": self.epilogue.activation}
        merging = {"PARTS": parts_of(self.parts)}
        center = {"CENTER": self.center}
        common = {
            "BR": self.BR, "BF": self.BF, "WIDE": triton_launch.is_wide(self.work),
            "num_warps": PACE.scaled(warps).warps,
        }  # fmt: skip
        slope, programs = (self.epilogue.slope,), (self.blocks, self.parts)
        start = lambda kernel, numbers, **constants: Launch(kernel, programs, numbers, **constants, **common)
        self._measure = {
            before: start(triton_wide.measure, self._place, PRE=before, **center) for before in (False, True)
        }
        self._normalise = {
            before: start(triton_wide.normalise, self._place + slope, PRE=before, **center, **follows, **merging)
            for before in (False, True)
        }
        self._sum_up = start(triton_wide.sum_up, self._place + slope, **follows)
        self._differentiate = start(triton_wide.differentiate, self._place + slope, **center, **follows, **merging)

    def forward(
        self, x: Tensor, residual: Any, weight: Any, bias: Any, running: Any, moved: Any, momentum: float, eps: float,
        bits: Tensor | None, *, summed: Tensor | None = None, before: bool = False, offset: float = 0.0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The output and the statistics; ``before``: the residual is added to the input, and ``summed`` receives it."""
        y = torch.empty_like(x)
        stats = torch.empty(2 * self.statistics, dtype=torch.float32, device=x.device)
        partials = self._partials(3, x)
        self._measure[before](x, residual, partials)
        self._normalise[before](
            x, residual, weight, bias, y, bits, stats, summed, partials, more=(float(eps), float(offset))
        )
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
            own = torch.empty(self.total.shape, dtype=torch.float32, device=x.device)
        given, more = (x, dy, residual, weight, bias, bits, stats, partials), (float(offset),)
        if own is not None or dx is not None:
            of_weight = own[0] if own is not None and need_weight else None
            of_bias = own[1] if own is not None and need_bias else None
            self._sum_up(*given, of_weight, of_bias, more=more)
        if dx is not None or dresidual is not None:
            self._differentiate(*given, dsummed, dx, dresidual, more=more)
        parameters = (None, None) if own is None else self.total(own, weight, bias, (need_weight, need_bias))
        return dx, *parameters, dresidual if through else (dy if need_residual else None)

    def _partials(self, count: int, x: Tensor) -> Tensor:
        return torch.empty(count, self.statistics, self.parts, dtype=torch.float32, device=x.device)
