"""Compiles the Triton kernels for GPUs that are not there: every launch of a forward and backward pass is caught.

``python tests/triton_ahead.py [80 90] [--all]`` says how many, one line per architecture; the tests run it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from normkit.kernels import triton_launch, triton_resident_launch, triton_rows_launch
from normkit.kernels.contract import Work
from normkit.kernels.triton import _settling
from normkit.kernels.triton_channels_launch import Channels
from normkit.kernels.triton_launch import Epilogue, Launch, kernel_for
from normkit.kernels.triton_rows_launch import rows_kernel

NAMES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int64: "*i64",
}
WORKS = (
    Work("planes", 4, 64, 196, 0),
    Work("columns", 4, 64, 196, 0),
    Work("planes", 2, 320, 1024, 32),
    Work("columns", 2, 320, 1024, 32),
    Work("planes", 16, 64, 196, 64),
    Work("columns", 2, 512, 256, 2),
    Work("rows", 64, 768, 1, 1),
    Work("rows", 4096, 16384, 1, 1),
    Work("rows", 8, 16384, 1, 1),
    Work("rows", 64, 16, 1, 32),
    Work("tiles", 2, 96, 196, 0),
)

ATOMIC = re.compile(r"\b(atom|red)\.[\w.]*\.(f16|f32|f64|bf16)")
"""Whole numbers may be counted so."""

for _module in (triton_launch, triton_rows_launch):
    _module.processors = lambda device: 132  # those of an H200: few rows are split
triton_resident_launch.cache = lambda device: 50 * 2**20


Caught = list[tuple[Any, tuple, dict[str, Any]]]
"""Kernels with their arguments and constants."""


def launches(work: Work, dtype: torch.dtype, activation: str | None, *, residual: bool, wide: bool = False) -> Caught:
    """What a forward and a backward pass launch; nothing is computed."""
    caught: Caught = []

    def catch(launch: Launch, *tensors: torch.Tensor | None, more: tuple[float, ...] = ()) -> None:
        caught.append((launch.kernel, (*tensors, *launch.numbers, *more), launch.constants))

    before, Launch.__call__ = Launch.__call__, catch
    is_wide, triton_launch.is_wide = triton_launch.is_wide, lambda work: wide
    try:
        _pass_both_ways(work, dtype, activation, residual)
    finally:
        Launch.__call__, triton_launch.is_wide = before, is_wide
    return caught


def _pass_both_ways(work: Work, dtype: torch.dtype, activation: str | None, residual: bool) -> None:
    x = torch.empty((work.n, work.c, work.s), dtype=dtype)
    kernel = kernel_for(work, x, activation, 0.0, residual, True, True)
    channels = work.c * (work.groups if work.shape == "rows" else 1)
    weight, bias, stats = torch.ones(channels), torch.zeros(channels), torch.ones(2 * work.statistics)
    running = (
        (torch.zeros(channels), torch.ones(channels)) if not work.groups and work.shape != "rows" else (None, None)
    )
    bits = torch.empty(kernel.bits, dtype=torch.uint8) if kernel.bits else None
    added = x if residual else None
    kernel.forward(x, added, weight, bias, running, running, 0.1, 1e-5, bits)
    kept = added if bits is None and activation else None
    kernel.backward(x, x, kept, weight, bias, stats, bits, (True, True, True, residual))
    if isinstance(kernel, Channels):
        kernel.normalise(x, added, weight, bias, stats, bits)
        kernel.gradients(x, x, kept, weight, bias, stats, bits, None, (True, residual))
        if running[0] is not None:
            counter = torch.tensor(0)
            _settling(channels)(*running, *running, counter, counter)
    if work.shape == "rows" and work.groups == 1:  # add_norm, in every type
        plain = rows_kernel(work, dtype, Epilogue(None, 0.0, False), True, x.device)
        plain.forward(x, x, weight, bias, None, None, 0.0, 1e-5, None, summed=x, before=True, offset=1.0)
        plain.backward(x, x, None, weight, bias, stats, None, (True, True, True, False), dsummed=x, offset=1.0)


def source_of(kernel: Any, arguments: tuple, constants: dict[str, Any]) -> ASTSource:
    """As a launch would specialise it: what is None or 1 is a constant, what 16 divides is said to be so."""
    names = kernel.arg_names
    given = dict(zip(names, arguments, strict=False)) | {k: v for k, v in constants.items() if k in names}
    signature, fixed, facts = {}, {}, {}
    for i, name in enumerate(names):
        value = given[name]
        if isinstance(value, torch.Tensor):
            signature[name] = NAMES[value.dtype]
            facts[(i,)] = [["tt.divisibility", 16]]
        elif name in constants or value is None or value is True or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            fixed[(i,)] = value
        elif isinstance(value, int):
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                facts[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return ASTSource(kernel, signature, fixed, facts)


def sources(works: tuple[Work, ...] = WORKS) -> Iterator[tuple[str, ASTSource, dict[str, Any]]]:
    """Every different kernel, with its options."""
    seen = set()
    for work in works:
        for dtype, activation, residual, wide in (
            (torch.bfloat16, "relu", True, False),
            (torch.float16, "silu", True, False),
            (torch.float32, None, True, False),
            (torch.bfloat16, "gelu", False, True),
            (torch.bfloat16, "gelu_tanh", False, False),
        ):
            for kernel, arguments, constants in launches(work, dtype, activation, residual=residual, wide=wide):
                source = source_of(kernel, arguments, constants)
                options = {name: value for name, value in constants.items() if name not in kernel.arg_names}
                options["enable_fp_fusion"] = True
                key = (kernel.fn.__name__, str(source.signature), str(source.constants), str(options))
                if key not in seen:
                    seen.add(key)
                    yield f"{work.shape} {kernel.fn.__name__} {dtype} {activation}", source, options


def compiled(capability: int, works: tuple[Work, ...] = WORKS) -> int:
    """How many kernels were compiled; raises where one cannot be."""
    count = 0
    for what, source, options in sources(works):
        try:
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        except Exception as error:
            raise RuntimeError(f"{what}: {error}") from error
        assert "ptx" in made.asm
        if ATOMIC.search(made.asm["ptx"]):
            raise RuntimeError(f"{what}: an atomic addition of fractions, whose order is chance")
        count += 1
    return count


if __name__ == "__main__":
    chosen = WORKS if "--all" in sys.argv else (WORKS[1], WORKS[6], WORKS[8])
    for architecture in [int(word) for word in sys.argv[1:] if word.isdigit()] or [80, 90]:
        sys.stdout.write(f"sm_{architecture}: {compiled(architecture, chosen)} kernels compiled\n")
