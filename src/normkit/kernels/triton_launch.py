"""From a shape of work to launches of Triton kernels: blocks, programs, memory for partial sums.

Nothing here depends on values, waits for the device or measures a time (but :func:`tune`, on request): the same shape
on the same kind of GPU is cut up the same way, gives the same bits, and can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from normkit.kernels import contract, triton_channels, triton_rows, triton_tile

if TYPE_CHECKING:
    from normkit.kernels.triton_wide_launch import WideRows

TILE = 4096
"""Elements of 2 bytes in a tile; half as many of 4. With eight warps that is 16 elements and 100 registers a thread,
so that two or three programs share a processor: while one computes, the others have 8 kB of loads each in flight."""
MOST_PARTS = 64
"""Partial moments that every program of the second pass merges: one tile of [channels, parts]."""
PROGRAMS = 4
"""Per processor, where there is work for them."""
ALONE = 2**16
"""Elements below which one launch is better than two, however few programs it has: a launch costs microseconds."""
WIDEST = 8192
"""Features of a row that is kept in registers."""
WARPS = (4, 8, 16)
"""What tuning tries: 32, 16 and 8 elements of a tile a thread. More loads in flight against more registers is all that
a tile of a given size leaves to choose."""


@functools.cache
def processors(device: torch.device) -> int:
    """Of the GPU; a small number for the interpreter, so that a small tensor takes every path."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def launch(kernel: Any, programs: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start a kernel on the device of its first argument."""
    x = arguments[0]
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            kernel[programs](*arguments, **constants, enable_fp_fusion=True)
    else:
        kernel[programs](*arguments, **constants, enable_fp_fusion=True)  # the default of Triton 3.9, which it will end


def parts_of(needed: int) -> int:
    """The size of a tile axis for so many entries."""
    return triton.next_power_of_2(max(needed, 1))


def tile_of(dtype: torch.dtype) -> int:
    """Elements of a tile."""
    return TILE if dtype.itemsize == 2 else TILE // 2


def gradients_of(
    partials: Tensor, weight: Tensor | None, like_bias: Tensor | None, need: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Partial sums (2, parts, width) to the gradients of weight and bias."""
    _, parts, width = partials.shape
    dweight = torch.empty_like(weight) if need[0] and weight is not None else None
    dbias = torch.empty_like(like_bias) if need[1] and like_bias is not None else None
    if dweight is not None or dbias is not None:
        block = 64
        launch(
            triton_tile.total, (triton.cdiv(width, block),), partials, dweight, dbias, parts, width, parts * width,
            BLOCK=block, PARTS=min(64, parts_of(parts)), num_warps=4,
        )  # fmt: skip
    return dweight, dbias


@dataclass(slots=True)
class Epilogue:
    """What follows the affine step."""

    activation: str | None
    slope: float
    residual: bool

    @property
    def keeps_bits(self) -> bool:
        return self.activation == "relu" and self.residual


class Channels:
    """``planes`` and ``columns``: batch, group and instance norm."""

    def __init__(self, work: contract.Work, dtype: torch.dtype, epilogue: Epilogue, batch: bool, device: torch.device):
        self.work, self.epilogue, self.batch = work, epilogue, batch
        self.columns = work.shape == "columns"
        self.grouped = work.groups > 0
        self.pooled = work.c // work.groups if self.grouped else 1
        self.statistics = work.statistics
        together = contract.positions_per_run(work) if self.columns else 1
        self.bits = contract.bits_needed(work) if epilogue.keeps_bits and contract.bits_are_bytes(work) else 0
        self.warps = 8
        self._cut(tile_of(dtype), device)
        self.values = work.n * work.c * work.s // self.statistics
        run = contract.bit_bytes(together * work.c if self.columns else work.s)
        self._bits = (together, run, contract.section_bytes(work) if self.columns else 0)

    def _cut(self, tile: int, device: torch.device) -> None:
        """Blocks of channels, tiles of positions, and how many programs share the tiles of a block."""
        n, c, s = self.work.n, self.work.c, self.work.s
        sections = n if self.grouped else 1
        samples = 1 if self.grouped else n
        if self.columns and not self.grouped:  # positions of all samples follow each other
            samples, s = 1, n * s
        least = 64 if self.columns else max(16, tile // parts_of(min(s, 1024)))
        self.BC = min(max(16, parts_of(c)), 64, self._fitting(least))
        self.BP = max(16, min(tile // self.BC, parts_of(s), 1024))
        self.loop = self.pooled > self.BC
        stretch = self.pooled if self.loop else self._stretch(self.BC)
        per_stretch = triton.cdiv(stretch, self.BC)
        self.blocks = triton.cdiv(c, stretch) * per_stretch
        tiles = triton.cdiv(s, self.BP)
        items = tiles * samples
        programs = self.blocks * sections
        wanted = triton.cdiv(PROGRAMS * processors(device), programs)
        if n * c * self.work.s < ALONE and device.type == "cuda" and not self.loop:
            wanted = 1
        per = triton.cdiv(items, min(MOST_PARTS, wanted, items))
        self.parts = triton.cdiv(items, per)
        self.sections = sections
        self.programs = (programs, self.parts)
        stride_c, stride_s = (1, c) if self.columns else (s, 1)
        self.size = sections * self.parts * c
        where = (samples, c, s, stride_c, stride_s, tiles, items, per, self.parts)
        self._place = (*where, stretch, self.blocks, per_stretch, self.size)
        aligned = self.columns and c % 8 == 0 and stretch % 8 == 0
        self.constants = {"BC": self.BC, "BP": self.BP, "WIDE": n * c * self.work.s >= 2**31, "ALIGNED": aligned}

    def _stretch(self, block: int) -> int:
        """Channels of whole groups in a block; if there is one, a multiple of 8 where channels are neighbours."""
        step = math.lcm(self.pooled, 8) if self.columns else self.pooled
        return block // step * step or block // self.pooled * self.pooled

    def _fitting(self, least: int) -> int:
        """The block of 16, 32 or 64 channels that whole groups fill best, the narrowest of these from ``least`` on.

        Loads of eight neighbours are worth more than full blocks: a stretch that 8 divides goes first.
        """
        if self.pooled >= 64:
            return 64
        stretches = {b: self._stretch(b) for b in (64, 32, 16) if b >= self.pooled}
        aligned = {b: stretch for b, stretch in stretches.items() if self.columns and stretch % 8 == 0}
        filled = {b: stretch / b for b, stretch in (aligned or stretches).items()}
        good = [b for b, share in filled.items() if share >= 0.9 * max(filled.values())]
        return next((b for b in sorted(good) if b >= least), max(good))

    @property
    def _alone(self) -> bool:
        """One program has all tiles behind its statistics."""
        return self.parts == 1 and not self.loop

    @property
    def _pooling(self) -> str:
        return "loop" if self.loop else "block" if self.pooled > 1 else "none"

    def measured(self, x: Tensor) -> Tensor:
        """Count, mean and squared deviations of parts of channels: (3, sections, parts, c)."""
        partials = torch.empty((3, self.sections, self.parts, self.work.c), dtype=torch.float32, device=x.device)
        launch(
            triton_channels.measure, self.programs, x, partials, *self._place, **self.constants, num_warps=self.warps
        )
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
        if not self.batch:
            mean, var = running
            assert mean is not None
            assert var is not None
            stats = torch.cat([mean, torch.rsqrt(var + eps)])
            return self.normalise(x, residual, weight, bias, stats, bits), stats
        stats = torch.empty(2 * self.statistics, dtype=torch.float32, device=x.device)
        partials = None if self._alone else self.measured(x)
        source = "input" if self._alone else "partials"
        rest = (running, moved, momentum, eps)
        return self._normalise(x, residual, weight, bias, stats, bits, partials, source, *rest), stats

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
        nothing = (None, None)
        return self._normalise(x, residual, weight, bias, stats, bits, None, "given", nothing, nothing, 0.0, 0.0)

    def _normalise(
        self, x: Tensor, residual: Any, weight: Any, bias: Any, stats: Tensor, bits: Any, partials: Any, source: str,
        running: Any, moved: Any, momentum: float, eps: float,
    ) -> Tensor:  # fmt: skip
        y = torch.empty_like(x)
        values = float(self.values)
        launch(
            triton_channels.normalise, self.programs,
            x, residual, weight, bias, y, bits, stats, partials, *running, *moved,
            *self._place, self.pooled, self.statistics, values, 1 / max(values - 1, 1.0), momentum, eps,
            self.epilogue.slope, *self._bits,
            FROM=source, POOLING=self._pooling, GROUPED=self.grouped, ACTIVATION=self.epilogue.activation,
            COLUMNS=self.columns, PARTS=parts_of(self.parts), **self.constants, num_warps=self.warps,
        )  # fmt: skip
        return y

    def summed(self, x: Tensor, dy: Tensor, residual: Any, weight: Any, bias: Any, stats: Tensor, bits: Any) -> Tensor:
        """Sums of dz and of dz (x - mean) of parts of channels: (2, sections, parts, c)."""
        partials = torch.empty((2, self.sections, self.parts, self.work.c), dtype=torch.float32, device=x.device)
        launch(
            triton_channels.sum_up, self.programs,
            x, dy, residual, weight, bias, bits, stats, partials,
            *self._place, self.pooled, self.statistics, self.epilogue.slope, *self._bits,
            GROUPED=self.grouped, ACTIVATION=self.epilogue.activation, COLUMNS=self.columns,
            **self.constants, num_warps=self.warps,
        )  # fmt: skip
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
        parameters = need_weight or need_bias
        source, partials = "none", None
        if parameters or (need_x and self.batch):
            source = "input" if self._alone else "partials"
            partials = None if self._alone else self.summed(x, dy, residual, weight, bias, stats, bits)
        own: tuple[Tensor | None, Tensor | None]
        each = None
        if parameters and self.sections > 1:
            each = torch.empty((2, self.sections, self.work.c), dtype=torch.float32, device=x.device)
            own = each[0], each[1]
        else:
            wanted = ((weight, need_weight), (bias, need_bias))
            of_weight, of_bias = (torch.empty_like(t) if t is not None and need else None for t, need in wanted)
            own = of_weight, of_bias
        dx, dresidual = self._differentiate(
            x, dy, residual, weight, bias, stats, bits, partials, source, (need_x, need_residual), own
        )
        if each is not None:
            own = gradients_of(each, weight, bias, (need_weight, need_bias))
        return dx, *own, dresidual

    def gradients(
        self, x: Tensor, dy: Tensor, residual: Any, weight: Any, bias: Any, stats: Tensor, bits: Any, means: Tensor,
        need: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """Of x and residual, from sums divided by the counts, (2, units); per sample the weight is in them."""
        given = (x, dy, residual, weight, bias, stats, bits, means, "given")
        return self._differentiate(*given, need, (None, None))

    def _differentiate(
        self, x: Tensor, dy: Tensor, residual: Any, weight: Any, bias: Any, stats: Tensor, bits: Any, partials: Any,
        source: str, need: tuple[bool, bool], own: Any,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        dx = torch.empty_like(x) if need[0] else None
        through = need[1] and self.epilogue.activation is not None
        dresidual = torch.empty_like(x) if through else None
        if source != "none" or dx is not None or dresidual is not None:
            launch(
                triton_channels.differentiate, self.programs,
                x, dy, residual, weight, bias, bits, stats, partials, dx, dresidual, *own,
                *self._place, self.pooled, self.statistics, float(self.values), self.epilogue.slope, *self._bits,
                FROM=source, POOLING=self._pooling, GROUPED=self.grouped, BATCH=self.batch,
                ACTIVATION=self.epilogue.activation, COLUMNS=self.columns, PARTS=parts_of(self.parts),
                **self.constants, num_warps=self.warps,
            )  # fmt: skip
        return dx, dresidual if through else (dy if need[1] else None)  # without an activation it is dy itself


class Rows:
    """``rows`` and ``tiles``: layer and RMS norm, and group norm without space."""

    def __init__(self, work: contract.Work, dtype: torch.dtype, epilogue: Epilogue, center: bool, device: torch.device):
        self.work, self.epilogue, self.center = work, epilogue, center
        self.along_rows = work.shape == "tiles"
        self.statistics = work.statistics
        self.bits = contract.bits_needed(work) if epilogue.keeps_bits else 0
        self.features = work.c
        tile = tile_of(dtype)
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
        self.warps = 4 if self.BF * self.BR <= 4096 else 8
        self.blocks = triton.cdiv(triton.cdiv(rows, self.period), self.BR)
        self.all_blocks = samples * self.blocks
        per = triton.cdiv(self.all_blocks, min(self.all_blocks, max(1, PROGRAMS * processors(device) // self.period)))
        self.per, self.parts = per, triton.cdiv(self.all_blocks, per)
        self._place = (self.period, rows, work.c, *strides, self.statistics)
        self.constants = {
            "CENTER": center, "ACTIVATION": epilogue.activation, "ALONG_ROWS": self.along_rows,
            "ONE": self.one, "BR": self.BR, "BF": self.BF, "WIDE": work.n * work.c * work.s >= 2**31,
        }  # fmt: skip

    def forward(
        self, x: Tensor, residual: Any, weight: Any, bias: Any, running: Any, moved: Any, momentum: float, eps: float,
        bits: Tensor | None, *, summed: Tensor | None = None, before: bool = False, offset: float = 0.0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The output and the statistics; ``before``: the residual is added to the input, and ``summed`` receives it."""
        y = torch.empty_like(x)
        stats = torch.empty(2 * self.statistics, dtype=torch.float32, device=x.device)
        launch(
            triton_rows.forward, (self.all_blocks * self.period,),
            x, residual, weight, bias, y, bits, stats, summed,
            self.blocks, *self._place, eps, self.epilogue.slope, offset,
            PRE=before, **self.constants, num_warps=self.warps,
        )  # fmt: skip
        return y, stats

    def backward(
        self, x: Tensor, dy: Tensor, residual: Any, weight: Any, bias: Any, stats: Tensor, bits: Any,
        need: tuple[bool, bool, bool, bool], *, dsummed: Tensor | None = None, offset: float = 0.0,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        """Gradients of x, weight, bias and residual: those that are needed. ``dsummed``: more that arrives at x."""
        need_x, need_weight, need_bias, need_residual = need
        dx = torch.empty_like(x) if need_x else None
        through = need_residual and self.epilogue.activation is not None
        dresidual = torch.empty_like(x) if through else None
        partials = None
        if need_weight or need_bias:
            make = torch.empty if self.one else torch.zeros
            partials = make(2, self.parts, self.period * self.features, dtype=torch.float32, device=x.device)
        if partials is not None or dx is not None or dresidual is not None:
            launch(
                triton_rows.backward, (self.parts * self.period,),
                x, dy, residual, weight, bias, bits, stats, dsummed, dx, dresidual,
                partials[0] if need_weight and partials is not None else None,
                partials[1] if need_bias and partials is not None else None,
                self.blocks, self.per, self.all_blocks, *self._place, self.epilogue.slope, offset,
                **self.constants, num_warps=self.warps,
            )  # fmt: skip
        own: tuple[Tensor | None, Tensor | None] = (None, None)
        if partials is not None:
            own = gradients_of(partials, weight, bias, (need_weight, need_bias))
        return dx, *own, dresidual if through else (dy if need_residual else None)


def rows_kernel(
    work: contract.Work, dtype: torch.dtype, epilogue: Epilogue, center: bool, device: torch.device
) -> Rows | WideRows:
    """Rows that are wider than a tile and too few to fill the GPU are split; all others are not."""
    from normkit.kernels.triton_wide_launch import WideRows

    made = Rows(work, dtype, epilogue, center, device)
    whole = made.one or made.along_rows or made.period > 1 or made.all_blocks >= processors(device)
    return made if whole else WideRows(work, dtype, epilogue, center, device)


def kernel_for(
    work: contract.Work, x: Tensor, activation: str | None, slope: float, residual: bool, center: bool, batch: bool
) -> Channels | Rows | WideRows:
    """The kernel for a shape of work."""
    epilogue = Epilogue(activation, slope, residual)
    if work.shape in ("planes", "columns"):
        made: Channels | Rows | WideRows = Channels(work, x.dtype, epilogue, batch, x.device)
    else:
        made = rows_kernel(work, x.dtype, epilogue, center, x.device)
    if os.environ.get("NORMKIT_TUNE") == "1" and x.is_cuda and not torch.cuda.is_current_stream_capturing():
        tune(made, x)
    return made


def tune(kernel: Channels | Rows | WideRows, x: Tensor) -> None:
    """Choose the number of warps by the time of a forward and a backward pass.

    Other warps add in another order: bits then depend on what was faster.
    """
    work, residual = kernel.work, x if kernel.epilogue.residual else None
    source = torch.randn_like(x)
    bits = torch.empty(kernel.bits, dtype=torch.uint8, device=x.device) if kernel.bits else None
    channels = work.c * (max(work.groups, 1) if work.shape == "rows" else 1)
    weight, bias = torch.ones(channels, device=x.device), torch.zeros(channels, device=x.device)
    given: tuple[Tensor | None, Tensor | None] = (None, None)
    if isinstance(kernel, Channels) and not kernel.batch:
        given = (bias, weight)
    kept = residual if bits is None and kernel.epilogue.activation else None

    def step() -> Tensor | None:
        _, stats = kernel.forward(source, residual, weight, bias, given, (None, None), 0.0, 1e-5, bits)
        need = (True, True, True, residual is not None)
        return kernel.backward(source, source, kept, weight, bias, stats, bits, need)[0]

    times = {}
    for warps in WARPS:
        kernel.warps = warps
        times[warps] = triton.testing.do_bench(step, warmup=5, rep=20)
    kernel.warps = min(times, key=lambda warps: times[warps])
