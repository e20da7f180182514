"""The compiled CPU kernels as a backend: eager calls, their gradients, and the gradients of those."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from normkit.kernels import limits, loading, operators
from normkit.kernels.plan import Plan, alike, plan_for
from normkit.kernels.proposal import ordinary

if TYPE_CHECKING:
    from normkit.call import Call

_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_PLAIN = (Tensor, torch.nn.Parameter)
_FIRST, _SECOND, _BOTH = 1, 2, 3  # steps of a backward pass: the sums come first, the gradients of the inputs second


def reasons_against(call: Call) -> list[str]:
    """Why the compiled kernels cannot, or will not unasked, run this call. Leaves the plan in the call."""
    if loading.module is None:
        return [loading.absence or ""]
    if torch.compiler.is_compiling():
        return _reasons_against_compiling(call)
    for tensor in (call.x, call.weight, call.bias, call.residual, call.running_mean, call.running_var):
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN:
            return ["an input is a subclass of Tensor, which sees torch's operators only"]
        if not tensor.is_cpu:
            return [f"a tensor is on {tensor.device}; these kernels are for the CPU"]
        if _is_wrapped(tensor):
            return ["a transform has left its wrapper around a tensor"]
        if tensor.layout is not torch.strided or tensor.is_neg() or tensor.is_nested:
            return ["a tensor is sparse or nested, or a view that changes its values"]
    if call.counted is not None:
        return ["a mask leaves out some of the values that share their statistics"]
    if call.composite:
        return ["the kernels know mean and variance only, the same for all that share them"]
    if call.eps <= 0:
        return ["epsilon is not positive, which torch refuses for some norms"]
    if _is_watched():
        return ["a transform, a tracer or forward-mode differentiation watches torch's operators"]
    plan = plan_for(call)
    if isinstance(plan, str):
        return [plan]
    call.plan = plan
    return []


def _reasons_against_compiling(call: Call) -> list[str]:
    """The same for what a compiler looks on at: asked once, when it captures the graph."""
    x, number = call.x, torch.float64 if call.x.dtype == torch.float64 else torch.float32
    if not x.is_cpu:
        return [f"a tensor is on {x.device}; these kernels are for the CPU"]
    if call.counted is not None or call.composite or call.merged or call.eps <= 0:
        return ["under a compiler the kernels run whole, plain norms only"]
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if not x.is_contiguous() and (last is None or not x.is_contiguous(memory_format=last)):
        return ["the input is neither contiguous nor channels-last in memory"]
    for parameter in (call.weight, call.bias):
        if parameter is not None and parameter.dtype not in (x.dtype, number):
            return [f"weight and bias are {parameter.dtype} beside {x.dtype}"]
    if call.residual is not None and call.residual.dtype != x.dtype:
        return ["the residual is of another type than the input"]
    return operators.reasons_against(call)


def reluctance(call: Call) -> list[str]:
    """Why the compiled kernels will not run a call that they could run, unless asked for by name."""
    if torch.compiler.is_compiling():
        faster = limits.compiler_is_faster(call.over, call.x, call.activation, call.batch_statistics)
        return ["a compiler of torch's operators is faster here"] if faster else []
    fused = call.residual is not None or call.activation is not None
    if not call.merged and limits.torch_is_faster(
        call.over, call.spec.center, call.x, call.activation, fused, call.batch_statistics
    ):
        return ["torch's operators were faster for this norm, size and layout"]
    return []


def _is_watched() -> bool:
    """Whether somebody wants to see, record or transform every operator: a compiled kernel is none."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def settle(
    mean: Tensor, var: Tensor, new_mean: Tensor, new_var: Tensor, tracked: Tensor | None, skipped: Tensor | None
) -> bool:
    """Copy what is proposed into the running mean and variance, if every variance is finite, and count the batch.

    False: not a case for these kernels, and nothing has been done.
    """
    dtype = var.dtype
    if (
        loading.module is None
        or not (new_mean.dtype == new_var.dtype == dtype)
        or not ordinary(mean, var, tracked, skipped)
        or torch.compiler.is_compiling()
        or _is_watched()
    ):
        return False
    loading.module.settle(
        dtype == torch.float64,
        mean.data_ptr(),
        var.data_ptr(),
        new_mean.data_ptr(),
        new_var.data_ptr(),
        var.numel(),
        _address(tracked),
        _address(skipped),
    )
    return True


def run(call: Call) -> Tensor:
    """Carry out a call that there is no reason against."""
    if torch.compiler.is_compiling():
        return operators.run("native", call)
    x, weight, bias, residual = call.x, call.weight, call.bias, call.residual
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        return _normalize(x, weight, bias, residual, call)
    return _forward(call.plan, x, weight, bias, residual, call, None)[0]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _forward(
    plan: Plan,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    call: Call,
    bits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output, and the statistics: all means, then all inverse deviations."""
    y = torch.empty_like(x)
    stats = torch.empty(2 * plan.statistics, dtype=plan.number)
    added = None if residual is None else alike(residual, x, plan.strides)  # held until the kernel has read it
    plan.kernel.forward(
        x.data_ptr(),
        _address(added),
        _address(weight),
        _address(bias),
        y.data_ptr(),
        _address(bits),
        stats.data_ptr(),
        _address(call.running_mean),
        _address(call.running_var),
        call.momentum,
        call.eps,
        torch.get_num_threads(),
    )
    return y, stats


class _Normalize(torch.autograd.Function):
    """One node in the graph for norm, residual and activation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, residual: Any, call: Call) -> Tensor:
        plan: Plan = call.plan
        bits = torch.empty(plan.bits, dtype=torch.uint8) if plan.bits else None
        y, stats = _forward(plan, x, weight, bias, residual, call, bits)
        ctx.save_for_backward(x, weight, bias if plan.gate else None, residual if plan.gate else None, stats, bits)
        ctx.plan, ctx.eps = plan, call.eps
        ctx.bias_type = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,) = grads
        if dy is None:
            return (None,) * 5
        if torch.is_grad_enabled() or _is_watched():
            return (*_differentiable(ctx, dy, _signs), None)
        found = _backward(ctx.plan, ctx.saved_tensors, dy, ctx.needs_input_grad[:4], ctx.bias_type)
        return (*found, None)


_normalize: Any = super(torch.autograd.Function, _Normalize).apply
"""Without what torch's Python does first and takes as long for as a small kernel: it looks for transforms, running and
ended, of which there are none here, and for default values."""


def _backward(
    plan: Plan, saved: tuple, dy: Tensor, need: tuple[bool, ...], bias_type: torch.dtype | None
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias and residual; ``saved``: x, weight, bias, residual, statistics, bits."""
    x, weight, bias, residual, stats, bits = saved
    x = alike(x, x, plan.strides)  # hooks on saved tensors may have laid it out anew
    need_x, need_weight, need_bias, need_residual = need
    dy = alike(dy, x, plan.strides)
    kept = None if residual is None else alike(residual, x, plan.strides)
    dx = torch.empty_like(x) if need_x else None
    # Without an activation the residual's gradient is dy itself.
    through = need_residual and plan.activation is not None
    dresidual = torch.empty_like(x) if through else (dy if need_residual else None)
    dweight = torch.empty_like(weight) if need_weight else None
    dbias = torch.empty(plan.parameters, dtype=bias_type) if need_bias else None
    plan.kernel.backward(
        x.data_ptr(),
        dy.data_ptr(),
        _address(kept),
        _address(weight),
        _address(bias),
        stats.data_ptr(),
        _address(bits),
        _address(dx),
        _address(dresidual) if through else 0,
        _address(dweight),
        _address(dbias),
        0,
        0.0,
        _BOTH,
        torch.get_num_threads(),
    )
    return dx, dweight, dbias, dresidual


operators.RUNS["native"] = operators.Runs(
    forward=lambda plan, call, bits: _forward(plan, call.x, call.weight, call.bias, call.residual, call, bits),
    backward=lambda plan, saved, dy, need: _backward(
        plan, saved, dy, need, None if saved[2] is None else saved[2].dtype
    ),
)
"""What compilers see of these kernels."""

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
}


def _differentiable(ctx: Any, dy: Tensor, signs_of: Callable[..., Tensor]) -> list[Tensor | None]:
    """The same gradients out of torch's operators, so that they can be differentiated again."""
    plan: Plan = ctx.plan
    x, weight, bias, residual, stats, bits = ctx.saved_tensors
    inputs = [x, weight, bias, residual]
    wanted = [i for i, need in enumerate(ctx.needs_input_grad[:4]) if need]
    with torch.enable_grad():
        for i in wanted:
            if inputs[i] is None:  # the gradients do not depend on this bias or residual: zero stands for it
                zero = torch.zeros_like(x) if i == 3 else x.new_zeros(plan.parameters, dtype=ctx.bias_type)
                inputs[i] = zero.requires_grad_()
        signs = None if bits is None else signs_of(plan, alike(x, x, plan.strides), stats, bits)
        y = _composite(plan, (x, *inputs[1:]), stats, ctx.eps, signs)
        grads = torch.autograd.grad(y, [inputs[i] for i in wanted], dy, create_graph=True)
    out: list[Tensor | None] = [None] * 4
    for i, grad in zip(wanted, grads, strict=True):
        out[i] = grad
    return out


def _signs(plan: Plan, x: Tensor, stats: Tensor, bits: Tensor) -> Tensor:
    """1 where the value before the ReLU was above zero, else 0: what a gradient of ones becomes on its way through."""
    ones, signs = torch.ones_like(x), torch.empty_like(x)
    addresses = (x.data_ptr(), ones.data_ptr(), 0, 0, 0, stats.data_ptr(), bits.data_ptr(), 0, signs.data_ptr(), 0, 0)
    plan.kernel.backward(*addresses, 0, 0.0, _SECOND, torch.get_num_threads())
    return signs


def _composite(
    plan: Plan,
    inputs: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    stats: Tensor,
    eps: float,
    signs: Any,
) -> Tensor:
    """The forward pass in torch's operators: input, weight, bias, residual."""
    x, weight, bias, residual = inputs
    wide = x.to(plan.number).reshape(plan.view)
    if plan.batch:
        centred = wide - wide.mean(plan.pooled, keepdim=True) if plan.center else wide
        hat = centred * torch.rsqrt(centred.square().mean(plan.pooled, keepdim=True) + eps)
    else:
        mean, rstd = (half.reshape(plan.weight_view) for half in stats.chunk(2))
        hat = (wide - mean) * rstd
    if weight is not None:
        hat = hat * weight.to(plan.number).reshape(plan.weight_view)
    if bias is not None:
        hat = hat + bias.to(plan.number).reshape(plan.weight_view)
    z = hat.reshape(x.shape)
    if residual is not None:
        z = z + residual
    if signs is not None:
        z = z * signs
    elif plan.activation == "leaky_relu":
        z = F.leaky_relu(z, plan.slope)
    elif plan.activation is not None:
        z = _FUNCTIONS[plan.activation](z)
    return z.to(x.dtype)
