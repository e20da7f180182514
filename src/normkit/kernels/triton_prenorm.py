"""Blocks that add before they normalise: ``h = x + residual; y = norm(h)``, both outputs from one pass over memory.

For layer and RMS norm over the last axis. Forward reads two tensors and writes two; backward reads the gradients of y
and h and h itself, and writes one gradient, which both inputs share. Eager calls go through an autograd function;
``torch.compile`` sees the operators ``normkit::add_norm`` and ``normkit::add_norm_backward``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from normkit.kernels.contract import Work
from normkit.kernels.plan import alike
from normkit.kernels.triton import INTERPRETED, TYPES
from normkit.kernels.triton_launch import Epilogue
from normkit.kernels.triton_rows_launch import rows_kernel


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    center: bool = True,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``h = x + residual``, ``y = (h - mean) / sqrt(var + eps) * (weight + weight_offset) + bias``.

    Args:
        x: (n..., c) on a GPU, contiguous.
        residual: of the same shape and type.
        weight: (c,), or ``None`` for 1.
        bias: (c,), or ``None`` for 0.
        eps: added to the variance.
        center: subtract the mean (layer norm); otherwise RMS norm.
        weight_offset: added to the weight, for models that keep it around 0 (Gemma).

    Returns:
        y and h, both of the shape and type of x; what is normalised is h as it is rounded to that type.

    Raises:
        ValueError: shapes, types or devices that do not fit.

    Example:
        ``y, h = add_norm(block(y), h, norm.weight, norm.bias)``: h is the residual of the next block.

    Not for gradients of gradients, nor under transforms of ``torch.func``: write the two steps there.
    """
    if against := _misfit(x, residual, weight, bias):
        raise ValueError(against)
    asked = (x, residual, weight, bias, float(eps), center, float(weight_offset))
    if torch.compiler.is_compiling():
        y, h, _ = torch.ops.normkit.add_norm(*asked)
        return y, h
    y, h, _ = _AddNorm.apply(*asked)
    return y, h


def _misfit(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None) -> str | None:
    """What was asked, why not, and what to do."""
    if x.shape != residual.shape or x.dtype != residual.dtype or not x.is_contiguous():
        return (
            f"add_norm: x is {tuple(x.shape)} {x.dtype}, the residual {tuple(residual.shape)} {residual.dtype}.\n"
            "  give two tensors of the same shape and type, x contiguous"
        )
    if x.dtype not in TYPES or x.numel() == 0:
        return f"add_norm: no kernel for {tuple(x.shape)} {x.dtype}; write h = x + residual; y = norm(h)"
    if any(t is not None and t.shape != x.shape[-1:] for t in (weight, bias)):
        return f"add_norm: weight and bias must be of shape ({x.shape[-1]},), the last axis of x"
    given = [t for t in (x, residual, weight, bias) if t is not None]
    if any(t.device != x.device for t in given) or not (x.is_cuda or (INTERPRETED and x.is_cpu)):
        return (
            f"add_norm: tensors on {', '.join(sorted({str(t.device) for t in given}))}; the kernel is for one GPU.\n"
            "  elsewhere: h = x + residual; y = norm(h)"
        )
    return None


@functools.lru_cache(maxsize=4096)
def _kernel(rows: int, c: int, dtype: torch.dtype, center: bool, device: torch.device) -> Any:
    return rows_kernel(Work("rows", rows, c, 1, 1), dtype, Epilogue(None, 0.0, False), center, device)


def _forward(
    x: Tensor, residual: Tensor, weight: Any, bias: Any, eps: float, center: bool, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, h and the statistics."""
    c, h = x.shape[-1], torch.empty_like(x)
    given = (x, alike(residual, x, x.stride()), weight, bias, None, None, 0.0, eps, None)
    kernel = _kernel(x.numel() // c, c, x.dtype, center, x.device)
    y, stats = kernel.forward(*given, summed=h, before=True, offset=offset)
    return y, h, stats


def _backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Any, bias: Any, stats: Tensor, center: bool, offset: float,
    need: list[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of h (which x and residual share), weight and bias; ``need``: which of the three."""
    dy, dh = alike(dy, h, h.stride()), None if dh is None else alike(dh, h, h.stride())
    kernel = _kernel(h.numel() // h.shape[-1], h.shape[-1], h.dtype, center, h.device)
    return kernel.backward(
        h, dy, None, weight, bias, stats, None, (need[0], need[1], need[2], False), dsummed=dh, offset=offset
    )[:3]


def _remember(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, _, weight, bias, _, center, offset = inputs
    _, h, stats = output
    ctx.save_for_backward(h, weight, bias, stats)
    ctx.center, ctx.offset = center, offset
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, backward: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
    need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
    need = [need_x or need_residual, need_weight, need_bias]
    both, dweight, dbias = dh, None, None
    if dy is not None:
        h, weight, bias, stats = ctx.saved_tensors
        both, dweight, dbias = backward(dy, dh, h, weight, bias, stats, ctx.center, ctx.offset, need)
    return (
        both if need_x else None,
        both if need_residual else None,
        dweight if need_weight else None,
        dbias if need_bias else None,
        *[None] * 3,
    )


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = _forward(*inputs)
        _remember(ctx, inputs, output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return _gradients(ctx, _backward, *grads[:2])


# What compilers see.


def _nothing(x: Tensor) -> Tensor:
    """An operator returns a tensor also where there is nothing to return."""
    return x.new_empty(0, dtype=torch.float32)


def _backward_whole(dy: Tensor, dh: Tensor | None, h: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(_nothing(h) if t is None else t for t in _backward(dy, dh, h, *rest))


def _forward_shapes(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    stats = x.new_empty(2 * (x.numel() // x.shape[-1]), dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(x), stats


def _backward_shapes(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Any, bias: Any, stats: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    like = zip((h, weight, bias), rest[-1], strict=True)
    return tuple(torch.empty_like(t) if t is not None and n else _nothing(h) for t, n in like)


_LIBRARY = torch.library.Library("normkit", "FRAGMENT")
_LIBRARY.define(
    "add_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, bool center, float offset)"
    " -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "add_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor? weight, Tensor? bias, Tensor stats, bool center, "
    "float offset, bool[] need) -> (Tensor, Tensor, Tensor)"
)
for _name, _do, _shapes in (
    ("add_norm", _forward, _forward_shapes),
    ("add_norm_backward", _backward_whole, _backward_shapes),
):
    _LIBRARY.impl(_name, _do, "CompositeExplicitAutograd")
    torch.library.register_fake(f"normkit::{_name}", _shapes, lib=_LIBRARY)
torch.library.register_autograd(
    "normkit::add_norm",
    lambda ctx, dy, dh, _: _gradients(ctx, torch.ops.normkit.add_norm_backward, dy, dh),
    setup_context=_remember,
    lib=_LIBRARY,
)
