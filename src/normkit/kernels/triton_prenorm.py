"""Blocks that add before they normalise: ``h = x + residual; y = norm(h)``, both outputs from one pass over memory.

For layer and RMS norm over the last axis. Forward reads two tensors and writes two; backward reads the gradients of y
and h and h itself, and writes one gradient, which both inputs share.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normkit.kernels.contract import Work
from normkit.kernels.plan import alike
from normkit.kernels.triton_launch import Epilogue, Rows


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
        ValueError: shapes or types that do not fit.
    """
    if x.shape != residual.shape or x.dtype != residual.dtype or not x.is_contiguous():
        raise ValueError(
            f"add_norm: x is {tuple(x.shape)} {x.dtype}, the residual {tuple(residual.shape)} {residual.dtype}.\n"
            "  give two tensors of the same shape and type, x contiguous"
        )
    c = x.shape[-1]
    if any(t is not None and t.shape != (c,) for t in (weight, bias)):
        raise ValueError(f"add_norm: weight and bias must be of shape ({c},), the last axis of x")
    return _AddNorm.apply(x, residual, weight, bias, eps, center, weight_offset)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Any, bias: Any, eps: float, center: bool, offset: float
    ) -> tuple[Tensor, Tensor]:
        work = Work("rows", x.numel() // x.shape[-1], x.shape[-1], 1, 1)
        ctx.kernel = kernel = Rows(work, x.dtype, Epilogue(None, 0.0, False), center, x.device)
        h = torch.empty_like(x)
        given = (x, alike(residual, x, x.stride()), weight, bias, None, None, 0.0, eps, None)
        y, stats = kernel.forward(*given, summed=h, before=True, offset=offset)
        ctx.save_for_backward(h, weight, bias, stats)
        ctx.offset = offset
        ctx.set_materialize_grads(False)
        return y, h

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        h, weight, bias, stats = ctx.saved_tensors
        dy, dh = (None if g is None else alike(g, h, h.stride()) for g in grads)
        if dy is None:
            return (dh, dh, *[None] * 5)
        need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
        need = (need_x or need_residual, need_weight, need_bias, False)
        dx, dweight, dbias, _ = ctx.kernel.backward(
            h, dy, None, weight, bias, stats, None, need, dsummed=dh, offset=ctx.offset
        )
        return (dx if need_x else None, dx if need_residual else None, dweight, dbias, *[None] * 3)
