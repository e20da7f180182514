"""Launches of ``triton_rows``: layer and RMS norm, and group norm without space."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from normkit.kernels import contract, triton_launch, triton_rows
from normkit.kernels.triton_launch import Epilogue, Launch, Total, parts_of, processors, stages_that_fit
from normkit.kernels.triton_wide_launch import WideRows

WIDEST = 16384
"""Features of a row that is kept in registers."""
TILE = 4096
"""Elements of 2 bytes of several short rows."""
FORWARD_EACH, BACKWARD_EACH = 1024, 512
"""Elements that a warp gets."""
STAGES, PROGRAMS = 3, 2
"""Of the backward pass, in which a program goes through many rows: each leaves a gradient of all weights."""
STAGED = 8192
"""Elements of a tile above which nothing is loaded in advance: there is no room for it."""


class Rows:
    """``rows`` and ``tiles``."""

    def __init__(self, work: contract.Work, dtype: torch.dtype, epilogue: Epilogue, center: bool, device: torch.device):
        self.work, self.epilogue, self.center = work, epilogue, center
        self.along_rows = work.shape == "tiles"
        self.statistics = work.statistics
        self.bits = contract.bits_needed(work) if epilogue.keeps_bits else 0
        self.wide: WideRows | None = None
        """For the backward pass of wide rows where a gradient of the sum comes in: too much for the registers."""
        tile = triton_launch.elements(TILE, dtype)
        if self.along_rows:
            samples, rows, self.period = work.n, work.s, 1
            strides = (1, work.s, work.s * work.c)
            self.BR = min(max(16, parts_of(rows)), 64)
            self.BF = max(16, min(parts_of(work.c), tile // self.BR))
        else:
            samples, rows, self.period = 1, work.n, max(work.groups, 1)
            strides = (work.c, 1, 0)
            self.BF = max(16, min(parts_of(work.c), WIDEST))
            self.BR = max(1, min(tile // self.BF, parts_of(triton.cdiv(rows, self.period))))
        self.one = work.c <= self.BF
        self.blocks = triton.cdiv(triton.cdiv(rows, self.period), self.BR)
        self.all_blocks = samples * self.blocks
        wanted = max(1, PROGRAMS * processors(device) // self.period)
        self.per = triton.cdiv(self.all_blocks, min(self.all_blocks, wanted))
        self.parts = triton.cdiv(self.all_blocks, self.per)
        self._place = (self.period, rows, work.c, *strides, self.statistics)
        read = 4 if epilogue.residual else 3  # x and dy; what comes in beside h; the residual
        size = self.BR * self.BF
        self.stages = stages_that_fit(STAGES if size <= STAGED else 1, read * size * dtype.itemsize, device)
        self.total = Total(self.parts, self.period * work.c)
        self.prepare()

    def prepare(self, warps: float = 1.0) -> None:
        """The launches; ``warps``: so many times as many as usual."""
        size = self.BR * self.BF
        among = lambda each: triton_launch.warps(max(4, min(16, size // each)), warps)
        constants = {
            "ACTIVATION": self.epilogue.activation, "CENTER": self.center, "ALONG_ROWS": self.along_rows,
            "ONE": self.one, "BR": self.BR, "BF": self.BF, "WIDE": triton_launch.is_wide(self.work),
        }  # fmt: skip
        forward = among(FORWARD_EACH)
        self._forward = {
            before: Launch(
                triton_rows.forward, (self.all_blocks * self.period,), (self.blocks, *self._place, self.epilogue.slope),
                PRE=before, **constants, num_warps=forward,
            )
            for before in (False, True)
        }  # fmt: skip
        self._backward = Launch(
            triton_rows.backward, (self.parts * self.period,),
            (self.blocks, self.per, self.all_blocks, *self._place, self.epilogue.slope),
            STAGES=self.stages, **constants, num_warps=among(BACKWARD_EACH),
        )  # fmt: skip
        if self.wide is not None:
            self.wide.prepare(warps)

    def forward(
        self, x: Tensor, residual: Any, weight: Any, bias: Any, running: Any, moved: Any, momentum: float, eps: float,
        bits: Tensor | None, *, summed: Tensor | None = None, before: bool = False, offset: float = 0.0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The output and the statistics; ``before``: the residual is added to the input, and ``summed`` receives it."""
        y = torch.empty_like(x)
        stats = torch.empty(2 * self.statistics, dtype=torch.float32, device=x.device)
        self._forward[before](x, residual, weight, bias, y, bits, stats, summed, more=(float(eps), float(offset)))
        return y, stats

    def backward(
        self, x: Tensor, dy: Tensor, residual: Any, weight: Any, bias: Any, stats: Tensor, bits: Any,
        need: tuple[bool, bool, bool, bool], *, dsummed: Tensor | None = None, offset: float = 0.0,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        """Gradients of x, weight, bias and residual: those that are needed. ``dsummed``: more that arrives at x."""
        if self.wide is not None and dsummed is not None:
            return self.wide.backward(x, dy, residual, weight, bias, stats, bits, need, dsummed=dsummed, offset=offset)
        need_x, need_weight, need_bias, need_residual = need
        dx = torch.empty_like(x) if need_x else None
        through = need_residual and self.epilogue.activation is not None
        dresidual = torch.empty_like(x) if through else None
        partials = None
        if need_weight or need_bias:
            make = torch.empty if self.one else torch.zeros
            partials = make(self.total.shape, dtype=torch.float32, device=x.device)
        if partials is not None or dx is not None or dresidual is not None:
            self._backward(
                x, dy, residual, weight, bias, bits, stats, dsummed, dx, dresidual,
                partials[0] if need_weight and partials is not None else None,
                partials[1] if need_bias and partials is not None else None,
                more=(float(offset),),
            )  # fmt: skip
        own: tuple[Tensor | None, Tensor | None] = (None, None)
        if partials is not None:
            own = self.total(partials, weight, bias, (need_weight, need_bias))
        return dx, *own, dresidual if through else (dy if need_residual else None)


def rows_kernel(
    work: contract.Work, dtype: torch.dtype, epilogue: Epilogue, center: bool, device: torch.device
) -> Rows | WideRows:
    """Rows that are wider than a tile are split, and wide ones that are too few to fill the GPU; no others."""
    made = Rows(work, dtype, epilogue, center, device)
    if made.along_rows or made.period > 1 or (work.c <= min(STAGED, WIDEST) and _fills(made, device)):
        return made
    wide = WideRows(work, dtype, epilogue, center, device)
    if not made.one or not _fills(made, device):
        return wide
    made.wide = wide
    return made


def _fills(rows: Rows, device: torch.device) -> bool:
    """Whether there is a row for every processor, or rows are short anyway."""
    return rows.all_blocks >= processors(device) or rows.work.c <= TILE
