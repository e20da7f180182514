"""Launches of ``triton_channels``: batch, group and instance norm."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from normkit.kernels import contract, triton_channels, triton_launch
from normkit.kernels.triton_launch import Epilogue, Launch, Pace, parts_of, processors

MEASURING = {"columns": Pace(2048, 4, 4, 4, channels=64), "planes": Pace(4096, 4, 3, 4, channels=16)}
SUMMING = {"columns": Pace(2048, 4, 4, 4, channels=64), "planes": Pace(2048, 8, 3, 4, channels=16)}
WRITING = {"columns": Pace(2048, 4, 2, 16, channels=64), "planes": Pace(2048, 4, 2, 16, channels=8)}
"""By the layout. Where channels are neighbours (``columns``) a tile has a line of the cache of them, 128 bytes;
elsewhere few, so that its runs of positions are long. The numbers are those that bench/gpu/sweep.py found fastest on an
H200."""
MERGED = 1024
"""Partial results that a program merges at a time."""


class Cut:
    """Blocks of channels, tiles of positions, and how many programs share the tiles of a block."""

    def __init__(self, work: contract.Work, pace: Pace, dtype: torch.dtype, device: torch.device) -> None:
        n, c, s = work.n, work.c, work.s
        columns, tile = work.shape == "columns", pace.elements(dtype)
        self.sections, samples = (n, 1) if work.groups else (1, n)
        if columns and not work.groups:  # positions of all samples follow each other
            samples, s = 1, n * s
        block = self._block(c, pace.channels, columns)
        positions = max(16, min(tile // block, parts_of(s)))
        tiles, blocks = triton.cdiv(s, positions), triton.cdiv(c, block)
        items, programs = tiles * samples, blocks * self.sections
        self.parts = min(items, triton.cdiv(pace.programs * processors(device), programs))
        self.programs = (programs, self.parts)
        strides = (1, c) if columns else (s, 1)
        self.place = (samples, c, s, *strides, tiles, items, self.parts, blocks)
        self.size = self.sections * self.parts * c
        self.constants = {
            "BC": block, "BP": positions, "WIDE": triton_launch.is_wide(work), "ALIGNED": columns and c % 8 == 0,
            "STAGES": pace.stages, "num_warps": pace.warps,
        }  # fmt: skip

    @staticmethod
    def _block(c: int, wanted: int, columns: bool) -> int:
        """A narrower one where channels are neighbours and more than a fourth of the block would be empty."""
        if not columns:
            return min(wanted, max(8, parts_of(c)))
        filled = {block: c / (triton.cdiv(c, block) * block) for block in (wanted, wanted // 2, wanted // 4)}
        return next((block for block, share in filled.items() if share >= 0.75), max(filled, key=lambda b: filled[b]))

    def partials(self, count: int, x: Tensor) -> Tensor:
        """Memory for (count, sections, c, parts) numbers."""
        shape = (count, self.sections, self.place[1], self.parts)
        return torch.empty(shape, dtype=torch.float32, device=x.device)


class Channels:
    """``planes`` and ``columns``."""

    def __init__(self, work: contract.Work, dtype: torch.dtype, epilogue: Epilogue, batch: bool, device: torch.device):
        self.work, self.epilogue, self.batch = work, epilogue, batch
        self.grouped = work.groups > 0
        self.statistics = work.statistics
        self.values = work.n * work.c * work.s // self.statistics
        self.bits = contract.bits_needed(work) if epilogue.keeps_bits and contract.bits_are_bytes(work) else 0
        self._where = dtype, device
        self.prepare()

    def prepare(self, warps: float = 1.0) -> None:
        """The launches; ``warps``: so many times as many as usual."""
        work, columns = self.work, self.work.shape == "columns"
        cut = lambda paces: Cut(work, paces[work.shape].scaled(warps), *self._where)
        self.measuring, self.summing, writing = cut(MEASURING), cut(SUMMING), cut(WRITING)
        together = contract.positions_per_run(work) if columns else 1
        run = contract.bit_bytes(together * work.c if columns else work.s)
        pooled = work.c // work.groups if self.grouped else 1
        units = (pooled, self.statistics)
        follows = (*units, self.epilogue.slope, together, run, contract.section_bytes(work) if columns else 0)
        kind = {"GROUPED": self.grouped, "ACTIVATION": self.epilogue.activation, "COLUMNS": columns}
        kernels = triton_channels

        one = self.measuring
        self._measure = Launch(kernels.measure, one.programs, (*one.place, one.size), **one.constants)
        merge = _merging(self.statistics, pooled * one.parts)
        values = float(self.values)
        self._settle = Launch(
            kernels.settle, (triton.cdiv(self.statistics, merge["UNITS"]),),
            (self.statistics, pooled * one.parts, one.size, values, 1 / max(values - 1, 1.0)), **merge,
        )  # fmt: skip
        self._normalise = Launch(
            kernels.normalise, writing.programs, (*writing.place, *follows), **kind, **writing.constants
        )
        two = self.summing
        self._sum_up = Launch(kernels.sum_up, two.programs, (*two.place, two.size, *follows), **kind, **two.constants)
        merge = _merging(self.statistics, pooled * two.parts)
        self._average = Launch(
            kernels.average, (triton.cdiv(self.statistics, merge["UNITS"]),),
            (work.c, two.parts, two.size, *units, values), GROUPED=self.grouped, **merge,
        )  # fmt: skip
        merge = _merging(work.c, two.sections * two.parts)
        self._own = Launch(
            kernels.own, (triton.cdiv(work.c, merge["UNITS"]),),
            (two.sections, work.c, two.parts, two.size, *units), **merge,
        )  # fmt: skip
        self._differentiate = Launch(
            kernels.differentiate, writing.programs, (*writing.place, *follows), **kind, **writing.constants
        )

    def measured(self, x: Tensor) -> Tensor:
        """Count, mean and squared deviations of parts of channels: (3, sections, c, parts)."""
        partials = self.measuring.partials(3, x)
        self._measure(x, partials)
        return partials

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running: tuple[Tensor | None, Tensor | None],
        moved: tuple[Tensor | None, Tensor | None],
        momentum: float,
        eps: float,
        bits: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The output, and all means and all inverse deviations; ``moved`` receives the running statistics."""
        if self.batch:
            stats = torch.empty(2 * self.statistics, dtype=torch.float32, device=x.device)
            self._settle(self.measured(x), stats, *running, *moved, more=(float(momentum), float(eps)))
        else:
            mean, var = running
            assert mean is not None
            assert var is not None
            stats = torch.cat([mean, torch.rsqrt(var + eps)])
        return self.normalise(x, residual, weight, bias, stats, bits), stats

    def normalise(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        stats: Tensor,
        bits: Tensor | None,
    ) -> Tensor:
        """With the means and inverse deviations in ``stats``."""
        y = torch.empty_like(x)
        self._normalise(x, residual, weight, bias, y, bits, stats)
        return y

    def summed(self, x: Tensor, dy: Tensor, residual: Any, weight: Any, bias: Any, stats: Tensor, bits: Any) -> Tensor:
        """Sums of dz and of dz (x - mean) of parts of channels: (2, sections, c, parts)."""
        partials = self.summing.partials(2, x)
        self._sum_up(x, dy, residual, weight, bias, bits, stats, partials)
        return partials

    def backward(
        self,
        x: Tensor,
        dy: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        stats: Tensor,
        bits: Tensor | None,
        need: tuple[bool, bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, weight, bias and residual: those that are needed."""
        need_x, need_weight, need_bias, need_residual = need
        dweight = torch.empty_like(weight) if need_weight and weight is not None else None
        dbias = torch.empty_like(bias) if need_bias and bias is not None else None
        parameters = dweight is not None or dbias is not None
        averages = None
        if need_x and self.batch:
            averages = torch.empty(2 * self.statistics, dtype=torch.float32, device=x.device)
        given = (x, dy, residual, weight, bias, stats, bits)
        if averages is not None or parameters:
            partials = self.summed(*given)
            if averages is not None or not self.grouped:
                self._average(partials, stats, weight, averages, dweight, dbias)
            if self.grouped and parameters:
                self._own(partials, stats, dweight, dbias)
        dx, dresidual = self.gradients(*given, averages, (need_x, need_residual))
        return dx, dweight, dbias, dresidual

    def gradients(
        self, x: Tensor, dy: Tensor, residual: Any, weight: Any, bias: Any, stats: Tensor, bits: Any, averages: Any,
        need: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """Of x and residual; ``averages``: of w dz and of w dz (x - mean), (2, units), ``None`` for constants."""
        dx = torch.empty_like(x) if need[0] else None
        through = need[1] and self.epilogue.activation is not None
        dresidual = torch.empty_like(x) if through else None
        if dx is not None or dresidual is not None:
            self._differentiate(x, dy, residual, weight, bias, bits, stats, averages, dx, dresidual)
        return dx, dresidual if through else (dy if need[1] else None)  # without an activation it is dy itself


def _merging(units: int, entries: int) -> dict[str, int]:
    """How many statistics a program merges, and how many parts of them at a time."""
    tile = min(parts_of(entries), MERGED)
    return {"UNITS": min(parts_of(units), max(1, MERGED // tile), 16), "ENTRIES": tile, "num_warps": 4}
