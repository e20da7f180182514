"""Launches of ``triton_channels``: batch, group and instance norm."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from normkit.kernels import contract, triton_channels, triton_resident_launch
from normkit.kernels.triton_launch import MERGED, Cut, Epilogue, Launch, Pace, parts_of
from normkit.kernels.triton_resident_launch import Resident

MEASURING = {"columns": Pace(2048, 4, 4, 4, channels=64), "planes": Pace(4096, 4, 3, 4, channels=16)}
SUMMING = {"columns": Pace(2048, 4, 4, 4, channels=64), "planes": Pace(2048, 8, 3, 4, channels=16)}
WRITING = {"columns": Pace(2048, 4, 2, 16, channels=64), "planes": Pace(2048, 4, 2, 16, channels=8)}
"""By the layout. Where channels are neighbours (``columns``) a tile has a line of the cache of them, 128 bytes;
elsewhere few, so that its runs of positions are long. The numbers are those that bench/gpu/sweep.py found fastest on an
H200."""


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
        self._own = self._adding(two)
        self._differentiate = Launch(
            kernels.differentiate, writing.programs, (*writing.place, *follows), **kind, **writing.constants
        )
        whole = self._resident(follows, kind, warps) if self.batch else (None, None)
        self._forward: Resident | None = whole[0]
        self._backward: Resident | None = whole[1]
        self._own_at_once = self._own if self._backward is None else self._adding(self._backward.teams)

    def _adding(self, cut: Cut) -> Launch:
        """The gradients of weight and bias, of partial sums that were cut so."""
        work, merge = self.work, _merging(self.work.c, cut.sections * cut.parts)
        pooled = work.c // work.groups if self.grouped else 1
        return Launch(
            triton_channels.own, (triton.cdiv(work.c, merge["UNITS"]),),
            (cut.sections, work.c, cut.parts, cut.size, pooled, self.statistics), **merge,
        )  # fmt: skip

    def _resident(
        self, follows: tuple[Any, ...], kind: dict[str, Any], warps: float
    ) -> tuple[Resident | None, Resident | None]:
        """A whole pass in one launch, where it fits."""
        given = (self.work, *self._where, follows, float(self.values), kind, warps)
        more = self.epilogue.residual and self.epilogue.activation is not None
        return triton_resident_launch.forward_for(*given), triton_resident_launch.backward_for(*given, more)

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
            if self._forward is not None:
                y, partials = torch.empty_like(x), self._forward.teams.partials(3, x)
                given = (x, residual, weight, bias, y, bits, stats, partials, *running, *moved)
                if self._forward(*given, more=(float(momentum), float(eps))):
                    return y, stats
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
        given = (x, dy, residual, weight, bias, stats, bits)
        averages = None
        if need_x and self.batch:
            averages = torch.empty(2 * self.statistics, dtype=torch.float32, device=x.device)
            if self._backward is not None:
                found = self._at_once(self._backward, given, averages, dweight, dbias, need_residual)
                if found is not None:
                    return found[0], dweight, dbias, found[1]
        if averages is not None or parameters:
            partials = self.summed(*given)
            if averages is not None or not self.grouped:
                self._average(partials, stats, weight, averages, dweight, dbias)
            if self.grouped and parameters:
                self._own(partials, stats, dweight, dbias)
        dx, dresidual = self.gradients(*given, averages, (need_x, need_residual))
        return dx, dweight, dbias, dresidual

    def _at_once(
        self,
        whole: Resident,
        given: tuple[Any, ...],
        averages: Tensor,
        dweight: Tensor | None,
        dbias: Tensor | None,
        need_residual: bool,
    ) -> tuple[Tensor, Tensor | None] | None:
        """All gradients by the resident kernel; where statistics are a sample's own, ``own`` adds over the samples."""
        x, dy, residual, weight, bias, stats, bits = given
        partials, dx = whole.teams.partials(2, x), torch.empty_like(x)
        dresidual = torch.empty_like(x) if need_residual and self.epilogue.activation is not None else None
        parameters = (None, None) if self.grouped else (dweight, dbias)
        if not whole(x, dy, residual, weight, bias, bits, stats, averages, partials, dx, dresidual, *parameters):
            return None
        if self.grouped and (dweight is not None or dbias is not None):
            self._own_at_once(partials, stats, dweight, dbias)
        return dx, dresidual if dresidual is not None else (dy if need_residual else None)

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
