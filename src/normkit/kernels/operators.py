"""What ``torch.compile`` sees of the kernels: two operators that change nothing in place.

``normkit::normalize`` gives the output, what a backward pass needs, and the running statistics as they become;
``normkit::normalize_backward`` the gradients. Both name the backend and look the plan up when they run, so that a graph
with symbols for sizes stays one graph. Exported programs never hold them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from normkit.epilogue import fusible
from normkit.exporting import exporting
from normkit.kernels import contract
from normkit.kernels.plan import Plan, plan_for
from normkit.layout import solve
from normkit.vocabulary.problem import Problem

if TYPE_CHECKING:
    from normkit.call import Call


@dataclass(frozen=True)
class Runs:
    """How a backend carries out a plan."""

    forward: Callable[[Plan, Any, Tensor | None], tuple[Tensor, Tensor]]
    """Plan, call, bits to fill -> output, statistics; the running statistics of the call move in place."""
    backward: Callable[[Plan, tuple, Tensor, tuple[bool, ...]], tuple[Tensor | None, ...]]
    """Plan; x, weight, bias, residual, statistics, bits; dy; which are wanted -> gradients of the first four."""
    keeps_bits: Callable[[contract.Work], bool] = lambda work: True
    """Whether behind a residual and a ReLU there are bits."""


RUNS: dict[str, Runs] = {}
"""By backend."""

_INPUTS = "Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? running_mean, Tensor? running_var"
_ASKED = (
    "str backend, str over, int groups, int trailing, int[]? sizes, bool center, bool batch, "
    "float momentum, float eps, str activation, float slope"
)
_ASKED_FOR = _ASKED.count(",") + 1


def reasons_against(call: Call) -> list[str]:
    """What must be known before the operator is in the graph; what comes out later, the operator itself refuses."""
    if call.over is None:
        return ["this norm is none that a pattern says"]
    if exporting():
        return ["an exported program consists of torch's operators"]
    if fusible(call.activation)[0] == "module":
        return ["the activation is not one that a kernel knows"]
    return []


def run(backend: str, call: Call) -> Tensor:
    """Put a call that there is no reason against into the graph."""
    activation, slope = fusible(call.activation)
    running = call.running_mean, call.running_var
    sizes = None if call.sizes is None else list(call.sizes)
    asked = (call.groups, call.trailing, sizes, call.spec.center, call.batch_statistics, call.momentum, call.eps)
    inputs = call.x, call.weight, call.bias, call.residual, *running
    y, _, _, *moved = torch.ops.normkit.normalize(*inputs, backend, call.over, *asked, activation or "", slope)
    if call.batch_statistics:
        for old, new in zip(running, moved, strict=True):
            if old is not None:
                old.copy_(new)
    return y


def _call_of(inputs: tuple, asked: tuple) -> tuple[Any, tuple[str | None, float]]:
    """The call again, as far as a plan needs it, and the activation."""
    _, over, groups, trailing, sizes, center, batch, momentum, eps, activation, slope = asked
    x, weight, bias, residual, running_mean, running_var = inputs
    call = SimpleNamespace(
        spec=SimpleNamespace(center=center, over=over), over=over, x=x, weight=weight, bias=bias, residual=residual,
        running_mean=running_mean, running_var=running_var, batch_statistics=batch, momentum=momentum, eps=eps,
        groups=groups, trailing=trailing, sizes=None if sizes is None else tuple(sizes), activation=activation or None,
        moved=None,
    )  # fmt: skip
    call.problem = lambda: _problem(call, solve)
    return call, (activation or None, slope)


def _problem(call: Any, solve: Callable[..., Any]) -> Problem:
    """As ``Call.problem``, for a call of this file."""
    shape = tuple(call.x.shape)
    layout = solve(call.over, shape, groups=call.groups, trailing=call.trailing)
    kind: Any = "channels" if 0 in layout.pooled and call.x.dim() > 1 and 0 not in layout.weighted else "rows"
    return Problem(
        kind, shape, tuple(call.x.stride()), layout.view, layout.pooled, layout.weighted,
        str(call.x.dtype).removeprefix("torch."), None, call.x.device.type,
        call.spec.center, call.batch_statistics, None, call.residual is not None, False,
    )  # fmt: skip


def _planned(call: Any, follows: tuple[str | None, float], backend: str) -> Plan:
    plan = plan_for(call, backend, follows)
    if isinstance(plan, str):
        raise RuntimeError(f"the {backend} kernels cannot run this input: {plan}")
    return plan


def _forward(*given: Any) -> tuple[Tensor, ...]:
    inputs, asked = given[:6], given[6:]
    call, follows = _call_of(inputs, asked)
    moved: list[Tensor | None] = [None, None]
    if call.batch_statistics:
        moved = [None if t is None else t.clone() for t in inputs[4:]]
        call.running_mean, call.running_var = moved
    plan = _planned(call, follows, asked[0])
    bits = call.x.new_empty(plan.bits, dtype=torch.uint8)
    y, stats = RUNS[asked[0]].forward(plan, call, bits if plan.bits else None)
    return y, stats, bits, *(_nothing(call.x) if t is None else t for t in moved)


def _forward_shapes(*given: Any) -> tuple[Tensor, ...]:
    inputs, asked = given[:6], given[6:]
    call, (activation, _) = _call_of(inputs, asked)
    x = call.x
    work = contract.reduce.__wrapped__(_problem(call, solve.__wrapped__))  # nothing is kept by symbols
    if isinstance(work, str):
        raise RuntimeError(f"the {asked[0]} kernels cannot run this input: {work}")
    keeps = activation == "relu" and call.residual is not None and RUNS[asked[0]].keeps_bits(work)
    bits = x.new_empty(contract.bits_needed(work) if keeps else 0, dtype=torch.uint8)
    stats = x.new_empty(2 * work.statistics, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    moved = [torch.empty_like(t) if t is not None and call.batch_statistics else _nothing(x) for t in inputs[4:]]
    return torch.empty_like(x), stats, bits, *moved


def _nothing(x: Tensor) -> Tensor:
    """An operator returns a tensor also where there is nothing to return."""
    return x.new_empty(0, dtype=torch.float32)


def _backward(dy: Tensor, stats: Tensor, bits: Tensor, follows: bool, need: list[bool], *given: Any) -> Any:
    """``follows``: there was a residual; it is given only where its value matters."""
    inputs, asked = given[:6], given[6:]
    x, residual = inputs[0], inputs[3]
    call, activation = _call_of((*inputs[:3], x if follows else None, *inputs[4:]), asked)
    plan = _planned(call, activation, asked[0])
    saved = (*inputs[:3], residual, stats, bits if plan.bits else None)
    found = RUNS[asked[0]].backward(plan, saved, dy, tuple(need))
    found = (*found[:3], found[3].clone() if found[3] is dy else found[3])  # an operator's output is no input of it
    return tuple(_nothing(x) if t is None else t for t in found)


def _backward_shapes(dy: Tensor, stats: Tensor, bits: Tensor, follows: bool, need: list[bool], *given: Any) -> Any:
    x, weight, bias = given[:3]
    like = (x, weight, bias, x)  # without an activation the residual's gradient is dy, laid out as the input
    return tuple(torch.empty_like(t) if n else _nothing(x) for t, n in zip(like, need, strict=True))


def _remember(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, residual, _, _, *asked = inputs  # the running statistics move on; what normalised is in stats
    _, stats, bits, *_ = output
    activation = asked[-2]
    gate = activation != "" and residual is not None and not (activation == "relu" and bits.numel() > 0)
    ctx.save_for_backward(x, weight, bias, residual if gate else None, stats, bits)
    ctx.asked, ctx.follows = tuple(asked), residual is not None
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, *_: Any) -> tuple:
    if dy is None:
        return (None,) * (6 + _ASKED_FOR)
    x, weight, bias, residual, stats, bits = ctx.saved_tensors
    need = list(ctx.needs_input_grad[:4])
    found = torch.ops.normkit.normalize_backward(
        dy, stats, bits, ctx.follows, need, x, weight, bias, residual, None, None, *ctx.asked
    )
    return (*(t if n else None for t, n in zip(found, need, strict=True)), *[None] * (2 + _ASKED_FOR))


_LIBRARY = torch.library.Library("normkit", "FRAGMENT")
_LIBRARY.define(f"normalize({_INPUTS}, {_ASKED}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
_LIBRARY.define(
    f"normalize_backward(Tensor dy, Tensor stats, Tensor bits, bool follows, bool[] need, {_INPUTS}, {_ASKED})"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
for _name, _do, _shapes in (
    ("normalize", _forward, _forward_shapes),
    ("normalize_backward", _backward, _backward_shapes),
):
    _LIBRARY.impl(_name, _do, "CompositeExplicitAutograd")
    torch.library.register_fake(f"normkit::{_name}", _shapes, lib=_LIBRARY)
torch.library.register_autograd("normkit::normalize", _gradients, setup_context=_remember, lib=_LIBRARY)
