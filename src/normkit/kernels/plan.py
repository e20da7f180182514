"""From a call to a kernel: what is looked up once per shape and kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from normkit.epilogue import fusible
from normkit.kernels import contract, loading
from normkit.layout import solve

if TYPE_CHECKING:
    from normkit.call import Call

SHAPES = {"planes": 0, "columns": 1, "rows": 2, "tiles": 3}
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
ACTIVATIONS = {None: 0, "relu": 1, "leaky_relu": 2, "silu": 3, "gelu": 4, "gelu_tanh": 5}
LEAKY_RELU_OUTPUT = 6
"""For a backward pass from the output of a leaky ReLU."""


@dataclass(slots=True)
class Plan:
    """A kernel for one kind of call, and what Python needs to know around it."""

    kernel: Any
    work: contract.Work
    strides: tuple[int, ...]
    number: torch.dtype
    """Of means, inverse deviations and sums."""
    weight_type: torch.dtype
    """Of weight and bias, and of their gradients."""
    statistics: int
    bits: int
    """Bytes of the mask that a backward pass needs."""
    gate: bool
    """Whether the gradient depends on bias and residual: an activation follows, and its sign is not saved in bits."""
    parameters: tuple[int, ...]
    """The shape of weight and bias."""
    view: tuple[int, ...]
    weight_view: tuple[int, ...]
    pooled: tuple[int, ...]
    center: bool
    batch: bool
    activation: str | None
    slope: float


_plans: dict[tuple, Plan | str] = {}


def plan_for(call: Call, backend: str = "native", follows: tuple[str | None, float] | None = None) -> Plan | str:
    """The plan for a call, or why there is none. Costs about a microsecond after the first time.

    ``backend``: whose kernel, of ``MAKERS``. ``follows``: the activation, where it is known better than the call says.
    """
    x, weight, bias, residual = call.x, call.weight, call.bias, call.residual
    name, slope = follows or fusible(call.activation)
    running = call.running_mean
    key = (
        backend,
        x.device,
        call.over,
        x.shape,
        x.stride(),
        x.dtype,
        None if weight is None else (weight.dtype, weight.shape, weight.is_contiguous()),
        None if bias is None else (bias.dtype, bias.shape, bias.is_contiguous()),
        None if residual is None else residual.dtype,
        name,
        slope,
        call.groups,
        call.trailing,
        call.sizes,
        call.batch_statistics,
        call.spec.center,
        None if running is None else (running.dtype, running.shape, running.is_contiguous()),
        None if call.running_var is None else (call.running_var.dtype, call.running_var.is_contiguous()),
    )
    found = _plans.get(key)
    if found is None:
        if len(_plans) >= 4096:  # shapes without end, as in a loop over sequence lengths
            _plans.clear()
        found = _plans[key] = _make(call, name, slope, MAKERS[backend])
    return found


def _native(work: contract.Work, call: Call, weight_type: torch.dtype, activation: str | None, slope: float) -> Any:
    return loading.module.Kernel(
        SHAPES[work.shape],
        TYPES[call.x.dtype],
        TYPES[weight_type],
        ACTIVATIONS[activation],
        slope,
        call.residual is not None,
        call.spec.center,
        call.batch_statistics,
        work.n,
        work.c,
        work.s,
        work.groups,
    )


Maker = Callable[[contract.Work, Any, torch.dtype, str | None, float], Any]
"""Work, call, type of the weight, activation and its slope -> something with ``statistics`` and ``bits``."""
MAKERS: dict[str, Maker] = {"native": _native}
"""By backend."""


def _make(call: Call, activation: str | None, slope: float, make_kernel: Maker) -> Plan | str:
    x, weight, bias = call.x, call.weight, call.bias
    if x.dtype not in TYPES:
        return f"no kernel for {x.dtype}"
    if activation == "module":
        return "the activation is not one that a kernel knows"
    number = torch.float64 if x.dtype == torch.float64 else torch.float32
    if against := _misfit(call, number):
        return against
    try:
        problem = call.problem()
    except ValueError as error:  # the shape does not fit the norm: torch says so in its own words
        return str(error)
    if problem is None:
        return "this norm is none that a pattern says"
    if call.sizes is not None and tuple(problem.view[axis] for axis in problem.weighted) != call.sizes:
        return f"the input {problem.shape} does not fit the sizes {call.sizes}"
    if not problem.elements:
        return "the input is empty"
    if call.batch_statistics and problem.values < 2:
        return "one value has no deviation"
    work = contract.reduce(problem)
    if isinstance(work, str):
        return work
    if work.groups and call.batch_statistics and call.running_mean is not None:
        return "no kernel averages running statistics over samples"
    channels = work.c * (work.groups if work.shape == "rows" else 1)
    if any(t is not None and t.numel() != channels for t in (weight, bias, call.running_mean, call.running_var)):
        return f"weight, bias and running statistics must have {channels} values each"
    weight_type = next((t.dtype for t in (weight, bias) if t is not None), number)
    kernel = make_kernel(work, call, weight_type, activation, slope)
    assert call.over is not None
    layout = solve(call.over, tuple(x.shape), groups=call.groups, trailing=call.trailing)
    return Plan(
        kernel=kernel,
        work=work,
        strides=x.stride(),
        number=number,
        weight_type=weight_type,
        statistics=kernel.statistics,
        bits=kernel.bits,
        gate=activation is not None and not kernel.bits,
        parameters=(channels,) if bias is None else tuple(bias.shape),
        view=layout.view,
        weight_view=layout.weight_view,
        pooled=layout.pooled,
        center=call.spec.center,
        batch=call.batch_statistics,
        activation=activation,
        slope=slope,
    )


def _misfit(call: Call, number: torch.dtype) -> str | None:
    """Why these types do not go together in one kernel. What torch refuses is left to torch to refuse."""
    x, weight, bias = call.x, call.weight, call.bias
    types = {t.dtype for t in (weight, bias) if t is not None}
    if len(types) > 1 or (types and not types <= {x.dtype, number}):
        return f"weight and bias are {' and '.join(map(str, sorted(types, key=str)))} beside {x.dtype}"
    if types - {x.dtype} and not call.spec.center:
        return f"beside a weight of another type the result is not {x.dtype}"
    if not all(t is None or t.is_contiguous() for t in (weight, bias, call.running_mean, call.running_var)):
        return "weight, bias or running statistics have gaps in memory"
    if call.residual is not None and call.residual.dtype != x.dtype:
        return f"the residual is {call.residual.dtype} beside {x.dtype}"
    for running in (call.running_mean, call.running_var):
        if running is not None and running.dtype != number:
            return f"the running statistics are {running.dtype} and not {number}"
    return None


def alike(tensor: Tensor, x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``tensor`` laid out in memory like ``x``; itself where it is so already."""
    if tensor.stride() == strides:
        return tensor
    if all(size == 1 or a == b for size, a, b in zip(x.shape, tensor.stride(), strides, strict=True)):
        return tensor
    return torch.empty_strided(x.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
