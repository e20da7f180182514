"""The Triton kernels as a backend: for GPUs, and for the CPU in Triton's interpreter (``TRITON_INTERPRET=1``).

Triton is optional and loaded with the first call that runs on it. Eager calls go straight to the kernels, inside one
autograd function, as on the CPU; ``torch.compile`` sees the two operators of ``kernels/operators.py``.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from normkit.kernels import contract, native, operators
from normkit.kernels.plan import MAKERS, Plan, alike, plan_for
from normkit.kernels.proposal import Proposal, plain

if TYPE_CHECKING:
    from normkit.call import Call

PROVEN: str | None = "7d530e926584"
"""The commit of these kernels at which parity has passed on a GPU: records/bench/gpu/<commit>/ holds the record.
``None``: it has not run on one yet, and nobody gets them unasked."""
FOUND = importlib.util.find_spec("triton") is not None
TYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LEAST = {"batch": 2**25, "groups": 2**23, "rows": 2**25}
"""Elements from which the kernels are taken unasked.

From the records of an H200 (tables in bench/gpu/README.md). The time of the device alone is less than torch's
from 2^20 on, of rows from 2^22. A call from Python costs 0.1 to 0.4 milliseconds more than torch's, and from here on
a loop of nothing but the norm is no slower for it, but for one row (group norm of 32x256x56x56, 0.94). Groups have a
lower limit because torch's group norm leaves more to save. The same while a CUDA graph is captured, where calls cost
nothing: a kernel that no call before has compiled cannot be loaded there. Never inside ``torch.compile``: there a
call costs as much, and one of what is compiled of torch's operators next to nothing."""
SPILLING = range(8193, 16385)
"""Features of a layer norm whose backward pass does not fit into the registers of a GPU, by the same record."""
OLDEST = (8, 0)
"""The compute capability that the kernels are compiled ahead of time for, beside the one that they have run on."""


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
    compiling = torch.compiler.is_compiling()  # Inductor starts Triton's kernels too, or says why not
    if call.x.is_cuda and not compiling and (hindrance := hindrance_to_start()):
        return [hindrance]
    if call.x.dtype not in TYPES:
        return [f"no Triton kernel for {call.x.dtype}"]
    if call.counted is not None:
        return ["a mask leaves out some of the values that share their statistics"]
    if call.composite:
        return ["the kernels know mean and variance only, the same for all that share them"]
    if call.eps <= 0:
        return ["epsilon is not positive, which torch refuses for some norms"]
    if compiling:
        return operators.reasons_against(call)
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


def reluctance(call: Call) -> list[str]:
    """Why they do not run unless asked for by name."""
    reasons = []
    if PROVEN is None:
        reasons.append('not yet checked on a GPU (bench/gpu/README.md); backend="triton" asks for them')
    if call.x.is_cuda and not _like_the_ones_they_ran_on(call.x.device):
        reasons.append(
            'checked on NVIDIA GPUs of compute capability 8.0 and later only; backend="triton" asks for them'
        )
    if torch.compiler.is_compiling():
        reasons.append(
            "calls of what a compiler makes of torch's operators cost less; in CUDA graphs "
            '(mode="reduce-overhead") they cost nothing: backend="triton" is worth a try'
        )
    elif not call.merged and torch_is_faster(call.x, call.over):
        reasons.append(f"below {LEAST[_kind(call.over)]:,} elements the call costs more than the kernels save")
    elif _widened_by_autocast(call):
        reasons.append("under autocast torch gives float32 here, and the kernels the type of the input")
    elif call.plan is not None and call.spec.center and call.plan.work.shape == "rows" and call.plan.work.c in SPILLING:
        reasons.append(f"of rows of {SPILLING[0]:,} to {SPILLING[-1]:,} features the layer norm of torch is faster")
    return reasons


def _widened_by_autocast(call: Call) -> bool:
    """The type of an output is not to hang on how large it is."""
    wider = call.spec.name in ("layer_norm", "rms_norm", "group_norm")
    narrow = call.x.dtype in (torch.bfloat16, torch.float16)
    return call.x.is_cuda and narrow and wider and torch.is_autocast_enabled("cuda")


def torch_is_faster(x: Tensor, over: str | None) -> bool:
    """Whether the call costs more than the kernels save."""
    return x.numel() < LEAST[_kind(over)]


def _kind(over: str | None) -> str:
    """Of statistics: those of the batch, of groups of a sample's channels (or of each), or of rows of features."""
    if over is None or over.startswith("[n"):
        return "batch"
    return "rows" if "c..." in over else "groups"


@functools.cache
def _like_the_ones_they_ran_on(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= OLDEST


@functools.cache
def hindrance_to_start() -> str | None:
    """Why Triton cannot start a kernel on this machine: what starts one it compiles from C, when it first runs."""
    from triton import knobs

    if knobs.build.impl is not None:  # somebody has another way
        return None
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton finds no C compiler, which it wants at run time: install gcc or clang, or set CC"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Triton finds no Python.h, which it wants at run time: install the headers of Python (python3-dev)"
    return None


def settle(
    mean: Tensor, var: Tensor, new_mean: Tensor, new_var: Tensor, tracked: Tensor | None, skipped: Tensor | None
) -> bool:
    """Copy what is proposed into the running mean and variance, if every variance is finite, and count the batch.

    False: not a case for this kernel, and nothing has been done.
    """
    if torch.compiler.is_compiling() or not launchable(mean, var, tracked, skipped) or native._is_watched():
        return False
    for proposed in (new_mean, new_var):
        if type(proposed) is not Tensor or proposed.device != mean.device or proposed.dtype != mean.dtype:
            return False
        if not proposed.is_contiguous():
            return False
    _settling(mean.numel())(mean, var, new_mean, new_var, tracked, skipped)
    return True


def launchable(mean: Tensor, var: Tensor, tracked: Tensor | None, skipped: Tensor | None) -> bool:
    """Whether a kernel can move these running statistics."""
    there = mean.get_device()
    return (
        FOUND
        and (mean.is_cuda or (INTERPRETED and mean.is_cpu))
        and var.get_device() == there
        and (tracked is None or tracked.get_device() == there)
        and (skipped is None or skipped.get_device() == there)
        and plain(mean, var, tracked, skipped)
        and not (mean.is_cuda and (not _like_the_ones_they_ran_on(mean.device) or hindrance_to_start()))
    )


class Launched(Proposal):
    """Running statistics on a GPU: two launches, where a fresh copy of each would take four."""

    __slots__ = ("_copies", "_settle")
    launches = True

    def __init__(self, mean: Tensor, var: Tensor, tracked: Tensor | None, skipped: Tensor | None) -> None:
        super().__init__(mean, var, tracked, skipped)
        self._copies = self.new_mean.data, self.new_var.data  # behind which nothing tells autograd of a change
        self._settle = _settling(mean.numel())

    def begin(self) -> tuple[Tensor, Tensor]:
        """The copies, as the running statistics are now. A kernel that moves them needs none, and writes there."""
        torch._foreach_copy_(self._copies, (self.mean, self.var))
        return self.new_mean, self.new_var

    def settle(self) -> None:
        """Let the copies in if every variance is finite, and count the batch."""
        self._settle(self.mean, self.var, *self._copies, self.tracked, self.skipped)


@functools.lru_cache(maxsize=1024)
def _settling(channels: int) -> Any:
    from normkit.kernels.triton_launch import Launch, parts_of
    from normkit.kernels.triton_running import settle as kernel

    return Launch(kernel, (1,), (channels,), BLOCK=min(parts_of(channels), 1024), num_warps=4)


def _kernel(work: contract.Work, call: Call, weight_type: torch.dtype, activation: str | None, slope: float) -> Any:
    from normkit.kernels.triton_launch import kernel_for

    residual = call.residual is not None
    return kernel_for(work, call.x, activation, slope, residual, call.spec.center, call.batch_statistics)


MAKERS["triton"] = _kernel


def run(call: Call) -> Tensor:
    """Carry out a call that there is no reason against."""
    if torch.compiler.is_compiling():
        return operators.run("triton", call)
    inputs = call.x, call.weight, call.bias, call.residual
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _Normalize.apply(*inputs, call)
    return forward(call.plan, call, keep=False)[0]


def at_once(call: Call) -> Tensor | None:
    """The output of a call whose running statistics are :func:`launchable` and go elsewhere (``moved``).

    In that no mask, transform or compiler is about, and all is of ordinary types. ``None``: ask the general way.
    """
    assert call.running_mean is not None
    there = call.running_mean.get_device()
    for tensor in (call.x, call.weight, call.bias, call.residual):
        if tensor is not None and (
            tensor.get_device() != there or tensor.is_neg() or tensor.is_nested or tensor.layout is not torch.strided
        ):
            return None
    plan = plan_for(call, "triton") if call.x.dtype in TYPES else None
    if plan is None or isinstance(plan, str):
        return None
    call.plan = plan
    return run(call)


def forward(plan: Plan, call: Call, *, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output, statistics (all means, then all inverse deviations), bits; ``keep``: for a backward pass."""
    bits = torch.empty(plan.bits, dtype=torch.uint8, device=call.x.device) if keep and plan.bits else None
    return *_carry_out(plan, call, bits), bits


def _carry_out(plan: Plan, call: Any, bits: Tensor | None) -> tuple[Tensor, Tensor]:
    running = call.running_mean, call.running_var
    moved = call.moved or running
    added = None if call.residual is None else alike(call.residual, call.x, plan.strides)
    return plan.kernel.forward(call.x, added, call.weight, call.bias, running, moved, call.momentum, call.eps, bits)


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


here = threading.local()
"""``compiled``: whether this thread carries out an operator of a compiled program, whose memory is not ours to keep."""


def _in_a_program(run: Any) -> Any:
    """``run``, as an operator of a compiled program."""

    def carried_out(*given: Any) -> Any:
        here.compiled = True
        try:
            return run(*given)
        finally:
            here.compiled = False

    return carried_out


operators.RUNS["triton"] = operators.Runs(_in_a_program(_carry_out), _in_a_program(backward), contract.bits_are_bytes)
"""What compilers see of these kernels."""
