"""Batch norm that keeps its output for the backward pass instead of its input: less activation memory.

The convolution behind the norm keeps that same output for its own backward pass, so nothing is kept twice, and the
norm's input, which nobody else needs, is freed (Rota Bulò, Porzi & Kontschieder 2018, arXiv:1712.02616). Backward finds
the standardised input again: the activation is undone, which gives z, and then it is (z - bias) / weight.

The backward kernel is that of every batch norm. Told that ``bias`` is the mean, ``1 / weight`` the inverse deviation
and ``weight² rstd`` the weight, it computes the gradients of the norm that led to z.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normkit.epilogue import undoing
from normkit.kernels import contract, loading, native
from normkit.kernels.plan import ACTIVATIONS, LEAKY_RELU_OUTPUT, SHAPES, TYPES, Plan, alike

if TYPE_CHECKING:
    from normkit.call import Call

LEAST_WEIGHT = 1e-3
"""Smaller ones are a few steps of an optimizer away from zero, where the input is lost."""
LARGEST_ERROR = 1 / 32
"""In deviations of the input: what rounding the output may add to the error that every number of its type has."""


def applies(call: Call) -> bool:
    """Whether a backward pass by this file will follow; transforms and tracers want to see torch's operators."""
    return (
        call.batch_statistics
        and torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in (call.x, call.weight, call.bias))
        and not native._is_watched()
    )


def run(call: Call, *, by_kernel: bool) -> Tensor:
    """A batch norm by batch statistics: with the compiled kernels, or with torch's operators.

    Raises:
        ValueError: a residual, an activation that cannot be undone, or a weight near 0.
    """
    if call.residual is not None:
        raise ValueError(
            'save="output" keeps y = activation(norm(x) + residual), and out of a sum nobody finds x again.\n'
            '  add the residual outside the norm, or choose save="input"'
        )
    slope = undoing(call.activation)
    _refuse_small(call.weight, call.bias, call.x.dtype)
    return _SavingOutput.apply(call.x, call.weight, call.bias, call, call.plan if by_kernel else None, slope)


def _refuse_small(weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> None:
    """One comparison per channel; on a GPU it waits for the device.

    Rounding y leaves a relative error u in z = weight xhat + bias. Divided by the weight that is u xhat, which every
    number of the type has, and u bias / weight, which must stay small.
    """
    if weight is None:
        return
    share = torch.finfo(dtype).eps / 2 / LARGEST_ERROR
    weight = weight.detach().abs()
    least = weight.new_full((), LEAST_WEIGHT) if bias is None else (bias.detach().abs() * share).clamp(min=LEAST_WEIGHT)
    small = weight < least
    if not small.any():
        return
    first = int(small.nonzero()[0])
    beside = "" if bias is None else f" beside a bias of {bias[first].item():.3g}"
    raise ValueError(
        f'save="output" divides by the weight to find the input again, and {int(small.sum())} of {small.numel()} are '
        f"too near 0.\n  channel {first}: |weight| {weight[first].item():.3g}{beside}; it must be at least "
        f"{LEAST_WEIGHT:g}, and {share:.2g} of |bias| for {str(dtype).removeprefix('torch.')}, or rounding the output "
        f'costs more than {LARGEST_ERROR:g} deviations\n  choose save="input" for this layer'
    )


class _SavingOutput(torch.autograd.Function):
    """One node in the graph for norm and activation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, call: Call, plan: Plan | None, slope: float) -> Tensor:
        if plan is not None:
            y, stats = native._forward(plan, x, weight, bias, None, call, None)
            rstd = stats[plan.statistics :]
        else:
            y, rstd = _forward_by_torch(call, slope)
        ctx.save_for_backward(y, weight, bias, rstd)
        ctx.work, ctx.slope, ctx.strides = plan and plan.work, slope, y.stride()
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,) = grads
        if dy is None:
            return (None,) * 6
        if torch.is_grad_enabled():
            raise RuntimeError(
                'save="output" gives gradients that cannot be differentiated again (create_graph=True): how '
                "1 / sqrt(var + eps) depends on the input is not in the output.\n"
                '  choose save="input" where gradients of gradients are wanted'
            )
        y, weight, bias, rstd = ctx.saved_tensors
        y = alike(y, y, ctx.strides)  # hooks on saved tensors may have laid it out anew
        scale = torch.ones_like(rstd) if weight is None else weight.to(rstd.dtype)
        shift = torch.zeros_like(rstd) if bias is None else bias.to(rstd.dtype)
        by = _backward_by_torch if ctx.work is None else _backward_by_kernel
        dx, dweight, dbias = by(ctx, y, dy, scale, shift, rstd)
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        return (
            dx if need_x else None,
            dweight.to(weight.dtype) if need_weight else None,
            dbias.to(bias.dtype) if need_bias else None,
            None,
            None,
            None,
        )


def _forward_by_torch(call: Call, slope: float) -> tuple[Tensor, Tensor]:
    """The output, and the inverse deviations."""
    number = torch.promote_types(call.x.dtype, torch.float32)
    weight, bias = (None if t is None else t.to(number) for t in (call.weight, call.bias))
    running = call.running_mean, call.running_var
    y, _, rstd = torch.native_batch_norm(call.x, weight, bias, *running, True, call.momentum, call.eps)
    return (F.leaky_relu_(y, slope) if slope else y), rstd.to(number)


def _backward_by_torch(
    ctx: Any, y: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    per_channel = [1, -1] + [1] * (y.dim() - 2)
    pooled = [axis for axis in range(y.dim()) if axis != 1]
    share = weight.numel() / y.numel()
    weight, bias, rstd = (t.view(per_channel) for t in (weight, bias, rstd))
    z, dz = y.to(rstd.dtype), dy.to(rstd.dtype)
    if ctx.slope:
        z, dz = torch.where(y > 0, z, z / ctx.slope), torch.where(y > 0, dz, dz * ctx.slope)
    hat = (z - bias) / weight
    dweight, dbias = (dz * hat).sum(pooled, keepdim=True), dz.sum(pooled, keepdim=True)
    dx = (dz - dbias * share - hat * (dweight * share)) * (rstd * weight)
    return dx.to(y.dtype), dweight.flatten(), dbias.flatten()


def _backward_by_kernel(
    ctx: Any, y: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, rstd: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    dy = alike(dy, y, y.stride())
    dx = torch.empty_like(y) if ctx.needs_input_grad[0] else None
    dweight, dbias = torch.empty_like(bias), torch.empty_like(bias)
    stats, steep = torch.cat([bias, weight.reciprocal()]), rstd * weight * weight
    _kernel(ctx.work, y.dtype, ctx.slope).backward(
        y.data_ptr(),
        dy.data_ptr(),
        0,
        steep.data_ptr(),
        0,
        stats.data_ptr(),
        0,
        0 if dx is None else dx.data_ptr(),
        0,
        dweight.data_ptr(),
        dbias.data_ptr(),
        0,
        0.0,
        native._BOTH,
        torch.get_num_threads(),
    )
    return dx, dweight, dbias


@lru_cache(maxsize=4096)
def _kernel(work: contract.Work, dtype: torch.dtype, slope: float) -> Any:
    """For the backward pass alone; the weight has the type of the statistics."""
    number = torch.promote_types(dtype, torch.float32)
    kinds = SHAPES[work.shape], TYPES[dtype], TYPES[number], LEAKY_RELU_OUTPUT if slope else ACTIVATIONS[None]
    return loading.module.Kernel(*kinds, slope, False, True, True, work.n, work.c, work.s, work.groups)
