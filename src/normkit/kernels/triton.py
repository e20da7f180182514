"""The Triton kernels as a backend: for GPUs, and for the CPU in Triton's interpreter (``TRITON_INTERPRET=1``).

Triton is optional and loaded with the first call that runs on it. Eager calls go straight to the kernels, inside one
autograd function, as on the CPU; ``torch.compile`` sees two operators, ``normkit::triton_forward`` and
``normkit::triton_backward``, which change nothing in place.
"""

from __future__ import annotations

import importlib.util
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from normkit.epilogue import fusible
from normkit.kernels import contract, native
from normkit.kernels.plan import MAKERS, Plan, alike, plan_for
from normkit.layout import solve

if TYPE_CHECKING:
    from normkit.dispatch import Call

PROVEN: str | None = None
"""The commit of these kernels at which parity has passed on a GPU: records/bench/gpu/<commit>/ holds the record.
``None``: it has not run on one yet, and nobody gets them unasked."""
FOUND = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def reasons_against(call: Call) -> list[str]:
    """Why the Triton kernels cannot run this call. Leaves the plan in the call, unless a compiler looks on."""
    if not FOUND:
        return ["Triton is not installed; the builds of torch for CUDA bring it"]
    for tensor in (call.x, call.weight, call.bias, call.residual, call.running_mean, call.running_var):
        if tensor is None:
            continue
        if not (tensor.is_cuda or (INTERPRETED and tensor.is_cpu)):
            return [f"a tensor is on {tensor.device.type}; these kernels are for CUDA (elsewhere: TRITON_INTERPRET=1)"]
        if tensor.device != call.x.device:
            return [f"tensors are on {call.x.device} and on {tensor.device}"]
        if tensor.layout is not torch.strided:
            return ["a tensor is sparse or nested"]
    if call.x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return [f"no Triton kernel for {call.x.dtype}"]
    if call.counted is not None:
        return ["a mask leaves out some of the values that share their statistics"]
    if call.composite:
        return ["the kernels know mean and variance only, the same for all that share them"]
    if call.eps <= 0:
        return ["epsilon is not positive, which torch refuses for some norms"]
    if torch.compiler.is_compiling():
        return _reasons_against_compiling(call)
    for tensor in (call.x, call.weight, call.bias, call.residual, call.running_mean, call.running_var):
        if tensor is not None and (type(tensor) not in native._PLAIN or tensor.is_neg() or tensor.is_nested):
            return ["an input is a subclass of Tensor, nested, or a view that changes its values"]
    if native._is_watched():
        return ["a transform, a tracer or forward-mode differentiation watches torch's operators"]
    plan = plan_for(call, "triton")
    if isinstance(plan, str):
        return [plan]
    call.plan = plan
    return []


def _reasons_against_compiling(call: Call) -> list[str]:
    """What must be known before the operator is in the graph; the rest the operator itself refuses."""
    if call.over is None:
        return ["this norm is none that a pattern says"]
    if torch.compiler.is_exporting():
        return ["an exported program consists of torch's operators"]
    if fusible(call.activation)[0] == "module":
        return ["the activation is not one that a kernel knows"]
    return []


def reluctance(call: Call) -> list[str]:
    """Why they do not run unless asked for by name."""
    if PROVEN is None:
        return ['not yet checked on a GPU (bench/gpu/README.md); backend="triton" asks for them']
    return []


def _kernel(work: contract.Work, call: Call, weight_type: torch.dtype, activation: str | None, slope: float) -> Any:
    from normkit.kernels.triton_launch import kernel_for

    residual = call.residual is not None
    return kernel_for(work, call.x, activation, slope, residual, call.spec.center, call.batch_statistics)


MAKERS["triton"] = _kernel


def run(call: Call) -> Tensor:
    """Carry out a call that there is no reason against."""
    if torch.compiler.is_compiling():
        return _run_compiling(call)
    inputs = call.x, call.weight, call.bias, call.residual
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _Normalize.apply(*inputs, call)
    return forward(call.plan, call, keep=False)[0]


def forward(plan: Plan, call: Call, *, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output, statistics (all means, then all inverse deviations), bits; ``keep``: for a backward pass."""
    running = call.running_mean, call.running_var
    bits = torch.empty(plan.bits, dtype=torch.uint8, device=call.x.device) if keep and plan.bits else None
    added = None if call.residual is None else alike(call.residual, call.x, plan.strides)
    given = (call.x, added, call.weight, call.bias, running, running, call.momentum, call.eps, bits)
    return *plan.kernel.forward(*given), bits


def backward(plan: Plan, saved: tuple, dy: Tensor, need: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias and residual; ``saved``: x, weight, bias, residual, statistics, bits."""
    x, weight, bias, residual, stats, bits = saved
    x = alike(x, x, plan.strides)  # hooks on saved tensors may have laid it out anew
    dy = alike(dy, x, plan.strides)
    kept = None if residual is None else alike(residual, x, plan.strides)
    return plan.kernel.backward(x, dy, kept, weight, bias, stats, bits, need)


class _Normalize(torch.autograd.Function):
    """One node in the graph for norm, residual and activation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, residual: Any, call: Call) -> Tensor:
        plan = ctx.plan = call.plan
        y, stats, bits = forward(plan, call, keep=True)
        ctx.save_for_backward(x, weight, bias, residual if plan.gate else None, stats, bits)
        ctx.eps, ctx.bias_type = call.eps, None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,) = grads
        if dy is None:
            return (None,) * 5
        if torch.is_grad_enabled() or native._is_watched():
            return (*native._differentiable(ctx, dy, _signs), None)
        return (*backward(ctx.plan, ctx.saved_tensors, dy, ctx.needs_input_grad[:4]), None)


def _signs(plan: Plan, x: Tensor, stats: Tensor, bits: Tensor) -> Tensor:
    """1 where the value before the ReLU was above zero, else 0."""
    need = (False, False, False, True)
    signs = plan.kernel.backward(x, torch.ones_like(x), None, None, None, stats, bits, need)[3]
    assert signs is not None
    return signs


# What torch.compile sees.

_ASKED = (
    "str over, int groups, int trailing, int[]? sizes, bool center, bool batch, float momentum, float eps, "
    "str activation, float slope"
)
_INPUTS = "Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? running_mean, Tensor? running_var"
_LIBRARY = torch.library.Library("normkit", "DEF") if FOUND else None


def _run_compiling(call: Call) -> Tensor:
    activation, slope = fusible(call.activation)
    running = call.running_mean, call.running_var
    sizes = None if call.sizes is None else list(call.sizes)
    asked = (call.groups, call.trailing, sizes, call.spec.center, call.batch_statistics, call.momentum, call.eps)
    y, _, _, *moved = torch.ops.normkit.triton_forward(
        call.x, call.weight, call.bias, call.residual, *running, call.over, *asked, activation or "", slope
    )
    if call.batch_statistics:
        for old, new in zip(running, moved, strict=True):
            if old is not None:
                old.copy_(new)
    return y


def _call_of(inputs: tuple, asked: tuple) -> tuple[Any, tuple[str | None, float]]:
    from normkit.dispatch import Call

    over, groups, trailing, sizes, center, batch, momentum, eps, activation, slope = asked
    x, weight, bias, residual, running_mean, running_var = inputs
    call = Call(
        SimpleNamespace(center=center, over=over), x, weight, bias, by_torch=lambda: x,  # type: ignore[arg-type]
        eps=eps, groups=groups, trailing=trailing, sizes=None if sizes is None else tuple(sizes), residual=residual,
        running_mean=running_mean, running_var=running_var, batch_statistics=batch, momentum=momentum,
    )  # fmt: skip
    return call, (activation or None, slope)


def _planned(inputs: tuple, asked: tuple) -> tuple[Plan, Any]:
    call, follows = _call_of(inputs, asked)
    plan = plan_for(call, "triton", follows)
    if isinstance(plan, str):
        raise RuntimeError(f"the Triton kernels cannot run this input: {plan}")
    return plan, call


def _forward_operator(*given: Any) -> tuple[Tensor, ...]:
    plan, call = _planned(given[:6], given[6:])
    x = call.x
    nothing = x.new_empty(0, dtype=torch.float32)
    moved = tuple(None if t is None or not call.batch_statistics else torch.empty_like(t) for t in given[4:6])
    bits = torch.empty(plan.bits, dtype=torch.uint8, device=x.device)
    added = None if call.residual is None else alike(call.residual, x, plan.strides)
    y, stats = plan.kernel.forward(
        x, added, call.weight, call.bias, given[4:6], moved, call.momentum, call.eps, bits if plan.bits else None
    )
    return y, stats, bits, *(nothing.clone() if t is None else t for t in moved)


def _forward_shapes(*given: Any) -> tuple[Tensor, ...]:
    call, (activation, _) = _call_of(given[:6], given[6:])
    x = call.x
    work = contract.reduce.__wrapped__(_problem(call))
    if isinstance(work, str):
        raise RuntimeError(f"the Triton kernels cannot run this input: {work}")
    keeps = activation == "relu" and call.residual is not None and contract.bits_are_bytes(work)
    bits = x.new_empty(contract.bits_needed(work) if keeps else 0, dtype=torch.uint8)
    stats = x.new_empty(2 * work.statistics, dtype=torch.float32)
    nothing = [x.new_empty(0, dtype=torch.float32) for _ in range(2)]
    moved = [
        torch.empty_like(t) if t is not None and call.batch_statistics else n
        for t, n in zip(given[4:6], nothing, strict=True)
    ]
    return torch.empty_like(x), stats, bits, *moved


def _problem(call: Any) -> Any:
    """As ``Call.problem``, for sizes that are symbols: nothing is kept by them."""
    from normkit.vocabulary.problem import Problem

    shape = tuple(call.x.shape)
    layout = solve.__wrapped__(call.over, shape, groups=call.groups, trailing=call.trailing)
    kind: Any = "channels" if 0 in layout.pooled and call.x.dim() > 1 and 0 not in layout.weighted else "rows"
    return Problem(
        kind, shape, tuple(call.x.stride()), layout.view, layout.pooled, layout.weighted, "", None, "",
        call.spec.center, call.batch_statistics, None, call.residual is not None, False,
    )  # fmt: skip


def _backward_operator(dy: Tensor, stats: Tensor, bits: Tensor, follows: bool, need: list[bool], *given: Any) -> Any:
    """``follows``: there was a residual; it is given only where its value matters."""
    x, residual = given[0], given[3]
    plan, _ = _planned((*given[:3], x if follows else None, *given[4:6]), given[6:])
    saved = (*given[:3], residual, stats, bits if plan.bits else None)
    found = backward(plan, saved, dy, tuple(need))
    found = (*found[:3], found[3].clone() if found[3] is dy else found[3])  # an operator's output is no input of it
    return tuple(x.new_empty(0) if t is None else t for t in found)


def _backward_shapes(dy: Tensor, stats: Tensor, bits: Tensor, follows: bool, need: list[bool], *given: Any) -> Any:
    x, weight, bias = given[:3]
    like = (x, weight, bias, x)
    # Without an activation the residual's gradient is dy, laid out as the input.
    return tuple(torch.empty_like(t) if n else x.new_empty(0) for t, n in zip(like, need, strict=True))


def _remember(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, residual, _, _, *asked = inputs  # the running statistics move on, and backward does not need them
    _, stats, bits, *_ = output
    activation = asked[8]
    gate = activation != "" and residual is not None and not (activation == "relu" and bits.numel() > 0)
    ctx.save_for_backward(x, weight, bias, residual if gate else None, stats, bits)
    ctx.asked, ctx.follows = tuple(asked), residual is not None
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, *_: Any) -> tuple:
    if dy is None:
        return (None,) * 16
    x, weight, bias, residual, stats, bits = ctx.saved_tensors
    need = list(ctx.needs_input_grad[:4])
    found = torch.ops.normkit.triton_backward(
        dy, stats, bits, ctx.follows, need, x, weight, bias, residual, None, None, *ctx.asked
    )
    return (*(t if n else None for t, n in zip(found, need, strict=True)), *[None] * 12)


if _LIBRARY is not None:
    _LIBRARY.define(f"triton_forward({_INPUTS}, {_ASKED}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
    _LIBRARY.define(
        f"triton_backward(Tensor dy, Tensor stats, Tensor bits, bool follows, bool[] need, {_INPUTS}, {_ASKED})"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    )
    for _name, _do, _shapes in (
        ("triton_forward", _forward_operator, _forward_shapes),
        ("triton_backward", _backward_operator, _backward_shapes),
    ):
        _LIBRARY.impl(_name, _do, "CompositeExplicitAutograd")
        torch.library.register_fake(f"normkit::{_name}", _shapes, lib=_LIBRARY)
    torch.library.register_autograd("normkit::triton_forward", _gradients, setup_context=_remember, lib=_LIBRARY)
