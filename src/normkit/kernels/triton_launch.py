"""What all Triton kernels share: how one is launched, and which one a shape of work gets.

Nothing here depends on values, waits for the device or measures a time (but :func:`tune`, on request): the same shape
on the same kind of GPU is cut up the same way, gives the same bits, and can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
import triton
from torch import Tensor

from normkit.kernels import contract, triton_tile

if TYPE_CHECKING:
    from normkit.kernels.triton_channels_launch import Channels
    from normkit.kernels.triton_rows_launch import Rows
    from normkit.kernels.triton_wide_launch import WideRows

    Kernel: TypeAlias = Channels | Rows | WideRows

WARPS = (1, 0.5, 2)
"""What tuning multiplies the numbers of warps by."""
MERGED = 1024
"""Partial results of channels that a program merges at a time."""


class Pace(NamedTuple):
    """How a pass goes through a tensor; which numbers are best was measured: docs/kernels.md."""

    tile: int
    """Elements of 2 bytes that a program looks at at a time; half as many of 4."""
    warps: int
    stages: int
    """Tiles that are on their way from memory at a time."""
    programs: int
    """Per processor, where there is work for them."""
    channels: int = 0
    """Of a tile, where it has channels."""

    def elements(self, dtype: torch.dtype) -> int:
        return elements(self.tile, dtype)

    def scaled(self, factor: float) -> Pace:
        """With more warps, or fewer."""
        return self._replace(warps=warps(self.warps, factor))


def elements(tile: int, dtype: torch.dtype) -> int:
    """Of a tile that holds so many of 2 bytes."""
    return tile if dtype.itemsize == 2 else tile // 2


def warps(usual: int, factor: float) -> int:
    """So many times as many as usual, as far as there can be."""
    return max(1, min(32, int(usual * factor)))


@dataclass(slots=True)
class Epilogue:
    """What follows the affine step."""

    activation: str | None
    slope: float
    residual: bool

    @property
    def keeps_bits(self) -> bool:
        return self.activation == "relu" and self.residual


class Launch:
    """A kernel with all that is the same in every call: programs, numbers, constants.

    Triton looks at every argument of every call to find what it has compiled, and that takes longer than a small kernel
    runs. Here it is kept by what can differ: which tensors there are, their types and whether 16 divides their address.

    Args:
        kernel: its parameters are tensors, numbers, further numbers that differ between calls, constants.
        programs: in one or two dimensions.
        numbers: in the order of the parameters.
        constants: by name, and options of the launch: ``num_warps``, of programs that wait for each other
            ``launch_cooperative_grid`` and ``maxnreg``.
    """

    def __init__(self, kernel: Any, programs: tuple[int, ...], numbers: tuple[Any, ...] = (), **constants: Any) -> None:
        self.kernel, self.numbers, self.constants = kernel, numbers, constants
        self.grid = (*programs, 1, 1)[:3]
        self._constants = tuple(constants[name] for name in kernel.arg_names if name in constants)
        self._compiled: dict[tuple, Any] = {}

    def __call__(self, *tensors: Tensor | None, more: tuple[float, ...] = ()) -> None:
        """Start it on the device of the first tensor, on the current stream. ``more``: floats."""
        device = tensors[0].get_device()  # type: ignore[union-attr]
        if device < 0 or device == torch.cuda.current_device():
            return self._start(device, tensors, more)
        with torch.cuda.device(device):
            return self._start(device, tensors, more)

    def _start(self, device: int, tensors: tuple[Tensor | None, ...], more: tuple[float, ...]) -> None:
        key = (device, *[None if t is None else (t.dtype, t.data_ptr() % 16) for t in tensors])
        compiled = self._compiled.get(key)
        if compiled is None:
            given = (*tensors, *self.numbers, *more)
            # enable_fp_fusion: the default of Triton 3.9, which it will end
            found = self.kernel[self.grid](*given, **self.constants, enable_fp_fusion=True)
            if device >= 0 and found is not None:  # the interpreter compiles nothing
                self._compiled[key] = found
            return
        stream = torch._C._cuda_getCurrentRawStream(device)
        compiled.run(
            *self.grid, stream, compiled.function, compiled.packed_metadata, None, None, None,
            *tensors, *self.numbers, *more, *self._constants,
        )  # fmt: skip


@functools.cache
def processors(device: torch.device) -> int:
    """Of the GPU; a small number for the interpreter, so that a small tensor takes every path."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def cache(device: torch.device) -> int:
    """Bytes of the GPU's second-level cache; few for the interpreter, likewise."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 2**20


def stages_that_fit(wanted: int, tile_bytes: int, device: torch.device) -> int:
    """How many tiles may be on their way to a program, so that all but one of them fit into its shared memory."""
    if device.type != "cuda":
        return wanted
    properties: Any = torch.cuda.get_device_properties(device)
    room = properties.shared_memory_per_block_optin - 2**13
    return max(1, min(wanted, 1 + room // tile_bytes))


def parts_of(needed: int) -> int:
    """The size of a tile axis for so many entries."""
    return triton.next_power_of_2(max(needed, 1))


def is_wide(work: contract.Work) -> bool:
    """Whether the place of an element needs 64 bits."""
    return work.n * work.c * work.s >= 2**31


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
        self.programs: tuple[int, ...] = (programs, self.parts)
        strides = (1, c) if columns else (s, 1)
        self.place = (samples, c, s, *strides, tiles, items, self.parts, blocks)
        self.size = self.sections * self.parts * c
        self.constants = {
            "BC": block, "BP": positions, "WIDE": is_wide(work), "ALIGNED": columns and c % 8 == 0,
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


class Total:
    """Partial sums (2, parts, width) to the gradients of weight and bias."""

    BLOCK = 32

    def __init__(self, parts: int, width: int) -> None:
        self.shape = (2, parts, width)
        self._launch = Launch(
            triton_tile.total, (triton.cdiv(width, self.BLOCK),), (parts, width, parts * width),
            BLOCK=self.BLOCK, PARTS=min(64, parts_of(parts)), num_warps=4,
        )  # fmt: skip

    def __call__(
        self, partials: Tensor, weight: Tensor | None, like_bias: Tensor | None, need: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        dweight = torch.empty_like(weight) if need[0] and weight is not None else None
        dbias = torch.empty_like(like_bias) if need[1] and like_bias is not None else None
        if dweight is not None or dbias is not None:
            self._launch(partials, dweight, dbias)
        return dweight, dbias


def kernel_for(
    work: contract.Work, x: Tensor, activation: str | None, slope: float, residual: bool, center: bool, batch: bool
) -> Kernel:
    """The kernel for a shape of work."""
    from normkit.kernels.triton_channels_launch import Channels
    from normkit.kernels.triton_rows_launch import rows_kernel

    epilogue = Epilogue(activation, slope, residual)
    if work.shape in ("planes", "columns"):
        made: Kernel = Channels(work, x.dtype, epilogue, batch, x.device)
    else:
        made = rows_kernel(work, x.dtype, epilogue, center, x.device)
    if os.environ.get("NORMKIT_TUNE") == "1" and x.is_cuda and not torch.cuda.is_current_stream_capturing():
        tune(made, x)
    return made


def tune(kernel: Kernel, x: Tensor) -> None:
    """Choose the number of warps by the time of a forward and a backward pass.

    Other warps add in another order: bits then depend on what was faster.
    """
    work, residual = kernel.work, x if kernel.epilogue.residual else None
    source = torch.randn_like(x)
    bits = torch.empty(kernel.bits, dtype=torch.uint8, device=x.device) if kernel.bits else None
    channels = work.c * (max(work.groups, 1) if work.shape == "rows" else 1)
    weight, bias = torch.ones(channels, device=x.device), torch.zeros(channels, device=x.device)
    given: tuple[Tensor | None, Tensor | None] = (None, None)
    if getattr(kernel, "batch", True) is False:
        given = (bias, weight)
    kept = residual if bits is None and kernel.epilogue.activation else None

    def step() -> Tensor | None:
        _, stats = kernel.forward(source, residual, weight, bias, given, (None, None), 0.0, 1e-5, bits)
        need = (True, True, True, residual is not None)
        return kernel.backward(source, source, kept, weight, bias, stats, bits, need)[0]

    times = {}
    for factor in WARPS:
        kernel.prepare(factor)
        times[factor] = triton.testing.do_bench(step, warmup=5, rep=20)
    kernel.prepare(min(times, key=lambda factor: times[factor]))
