"""Where torch's operators, or what a compiler makes of them, take less time than the compiled CPU kernels.

Limits found on a machine with two cores and AVX-512; docs/benchmarks.md shows what was measured around them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normkit.epilogue import fusible
from normkit.kernels import loading

BATCH, LAYER, GROUP, INSTANCE = "[n] c [s...]", "n... [c...]", "n (g [c]) [s...]", "n c [s...]"
OVER_CHANNELS = "n [c] s..."
SMALL = {BATCH: (2**16, 2**17), GROUP: (2**21, 2**18)}
"""Elements below which torch's one operator for a pattern is faster than a kernel, where nothing follows it: in 32 bits
and more, in 16. Torch has none for RMS norm: there a kernel is faster at any size."""
SMALL_FUSED = {BATCH: 2**15, GROUP: 3 * 2**15}
"""The same where a residual or an activation follows, for which torch needs further operators."""
SMALL_ROWS = {
    # something follows, 16 bits: below NARROW values, others
    (False, False): (2**21, 2**21),
    (False, True): (2**16, 2**17),
    (True, False): (2**16, 2**17),
    (True, True): (2**15, 2**16),
}
"""The same for layer norm, by the width of its rows: torch's operator takes long for many short ones."""
GROUP_LAST = 2**13
"""The same for group norm of channels-last inputs with nothing behind it, in 32 bits and more. Otherwise torch's
operators take longer there at every size that was tried, from a thousand elements on."""
BATCH_FORWARD, BATCH_FORWARD_FUSED = 2**22, 2**18
"""The same for batch norm in evaluation without gradients: torch's has one pass over memory to make."""
FEWEST = {BATCH: 2**15, LAYER: 2**15}
"""The least of all these for a pattern, whatever the type and the layout. Below it nothing else need be asked: small
calls feel every line."""
NARROW, MANY = 256, 2**10
"""Rows and maps of fewer values are short: they have more to begin and to end than to do. Torch's instance norm is
faster for many of these, where nothing follows."""
COMPILED, COMPILED_RELU, COMPILED_LAST = 2**20, 2**14, 2**18
"""Elements from which on a compiler puts these kernels into its graph as operators: any norm, one with a ReLU, and
group and instance norm of channels-last inputs."""


def torch_is_faster(
    over: str | None, center: bool, x: Tensor, activation: Any, fused: bool, by_batch: bool = True
) -> bool:
    """Whether torch's operators do the same in less time."""
    if center and x.numel() < FEWEST.get(over or "", 0):
        return True
    if over == BATCH and not by_batch and not torch.is_grad_enabled():
        slow = _is_gelu(activation, fused) and _dense_halves(x)
        return slow or x.numel() < (BATCH_FORWARD_FUSED if fused else BATCH_FORWARD)
    rule = _RULES.get(over or "")
    return center and rule is not None and rule(x, fused, _is_gelu(activation, fused))


def _is_gelu(activation: Any, fused: bool) -> bool:
    return fused and fusible(activation)[0] == "gelu"


def _dense_halves(x: Tensor) -> bool:
    """Of these torch's GELU takes the least time."""
    return x.element_size() < 4 and x.is_contiguous()


def _slow_gelu(x: Tensor, gelu: bool) -> bool:
    """float64 has no kernel of its own for it."""
    return gelu and (x.element_size() == 8 or (_dense_halves(x) and not loading.has_avx512))


def _batch(x: Tensor, fused: bool, gelu: bool) -> bool:
    return _slow_gelu(x, gelu) or x.numel() < (SMALL_FUSED[BATCH] if fused else SMALL[BATCH][x.element_size() < 4])


def _layer(x: Tensor, fused: bool, gelu: bool) -> bool:
    short, others = SMALL_ROWS[fused, x.element_size() < 4]
    return gelu or x.numel() < (short if x.shape[-1] < NARROW else others)


def _group(x: Tensor, fused: bool, gelu: bool) -> bool:
    half = x.element_size() < 4
    if _slow_gelu(x, gelu):
        return True
    if not x.is_contiguous():
        return not (fused or half) and x.numel() < GROUP_LAST
    return x.numel() < (SMALL_FUSED[GROUP] if fused else SMALL[GROUP][half])


def _instance(x: Tensor, fused: bool, gelu: bool) -> bool:
    if fused or x.element_size() < 4 or not x.is_contiguous():  # torch's operators lay channels-last out anew
        return False
    values = x.shape[2:].numel()
    return values < NARROW and x.numel() >= values * MANY


def _over_channels(x: Tensor, fused: bool, gelu: bool) -> bool:
    return not fused and x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


_RULES: dict[str, Callable[[Tensor, bool, bool], bool]] = {
    BATCH: _batch,
    LAYER: _layer,
    GROUP: _group,
    INSTANCE: _instance,
    OVER_CHANNELS: _over_channels,
}
"""For each pattern that torch has an operator for, whether this is faster: input, something follows, that is a GELU."""


def compiler_is_faster(over: str | None, x: Tensor, activation: Any, batch_statistics: bool) -> bool:
    """Whether a compiler that sees torch's operators makes of them what takes less time than these kernels.

    Without a backward pass, or by given statistics, it fuses the norm with its neighbours. In training Inductor wins
    where the cost of calling an operator is much of the whole; not with a ReLU, whose mask it stores bit by bit, and
    less so where it walks through channels-last inputs group by group.
    """
    if not (batch_statistics and torch.is_grad_enabled()):
        return True
    name, _ = fusible(activation)
    if name == "gelu":
        return True
    if name == "relu":
        return x.numel() < COMPILED_RELU
    last = over in (GROUP, INSTANCE) and not x.is_contiguous()
    return x.numel() < (COMPILED_LAST if last else COMPILED)
