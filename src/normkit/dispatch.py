"""Picks a backend for one application of a norm; :mod:`normkit.explanation` says which, and why not the others.

``native`` runs the compiled CPU kernels, ``triton`` those for GPUs. ``torch`` runs torch's operators under torch's
autograd: the fall-back, and what exported programs consist of. ``reference`` is the oracle and runs only when it is
asked for. The entries of ``BACKENDS`` are asked in order; no norm names one.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normkit import epilogue, masked, reference
from normkit.call import Call
from normkit.kernels import limits, loading, native, output_saved, triton
from normkit.kernels import phases as halves
from normkit.kernels.proposal import Proposal, Uncompiled, ordinary
from normkit.vocabulary.spec import Spec


@dataclass(frozen=True)
class Backend:
    """One way to carry out a call."""

    name: str
    reasons_against: Callable[[Call], list[str]]
    """Why it cannot run this call; empty: it can."""
    run: Callable[[Call], Tensor]
    reluctance: Callable[[Call], list[str]] = lambda call: []
    """Why it will not run this call unless asked for by name; empty: it will."""


def _run_torch(call: Call) -> Tensor:
    y = call.by_torch()
    fresh = _is_fresh(call.spec, {}) and call.counted is None
    return epilogue.apply(y, call.residual, call.activation, fresh=fresh)


TORCH = Backend("torch", lambda call: [], _run_torch)
REFERENCE = Backend("reference", lambda call: ["it is the oracle and runs only when asked for by name"], reference.run)

NATIVE = Backend("native", native.reasons_against, native.run, native.reluctance)

TRITON = Backend("triton", triton.reasons_against, triton.run, triton.reluctance)

BACKENDS: dict[str, Backend] = {"native": NATIVE, "triton": TRITON, "torch": TORCH, "reference": REFERENCE}
"""In the order in which they are asked; ``auto`` takes the first that has no reason against."""
_OURS = frozenset(BACKENDS)

ERRORS = (RuntimeError, ValueError, TypeError)
"""What is told in its context, if it is exactly one of these."""

_active = "auto"
_recording: list[Call] | None = None
_recorder = 0  # the thread that records; the layers of all others compute
_one_at_a_time = threading.Lock()


def normalize(
    spec: Spec,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    by_torch: Callable[[], Tensor],
    residual: Tensor | None = None,
    activation: epilogue.Activation = None,
    backend: str | None = None,
    mask: Tensor | None = None,
    **details: Any,
) -> Tensor:
    """Carry out one norm on the backend that the caller, the surrounding ``nk.backend`` or the order chooses.

    ``mask`` broadcasts against ``x``: only where it is True do values enter the statistics; elsewhere the output is 0.
    Input and residual are 0 there already: what is there may be NaN, and ``by_torch`` has the input at hand.
    """
    if residual is not None and residual.shape != x.shape:
        raise ValueError(_misfit(spec, x, residual))
    if mask is not None:
        call = Call(spec, x, weight, bias, by_torch, **details)
        if masked.divides(call, mask):
            call.counted = details["counted"] = mask
            by_torch = functools.partial(masked.normalised, call)
        following: dict[str, Any] = {"residual": residual, "activation": activation, "backend": backend}
        return torch.where(mask, normalize(spec, x, weight, bias, by_torch=by_torch, **following, **details), 0)
    name = asked(backend)
    followed = residual is not None or activation is not None
    try:
        direct = name == "torch" or (name == "auto" and _torch_at_once(spec, x, activation, followed, **details))
        if direct and _recording is None and "save_output" not in details:
            y = by_torch()  # nothing is to be decided: on a megabyte every further line would show
            return epilogue.apply(y, residual, activation, fresh=_is_fresh(spec, details)) if followed else y
        return _decided(name, direct, spec, x, weight, bias, by_torch, residual, activation, **details)
    except ERRORS as error:
        if type(error) not in ERRORS:
            raise  # out of memory and the like speak for themselves
        raise type(error)(_in_context(error, Call(spec, x, weight, bias, by_torch, **details))) from error


def _decided(
    name: str,
    direct: bool,
    spec: Spec,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    by_torch: Callable[[], Tensor],
    residual: Tensor | None,
    activation: epilogue.Activation,
    **details: Any,
) -> Tensor:
    """Whichever backend has to, with what follows the norm; ``direct``: torch, as far as that is settled."""
    save_output = details.get("save_output", False) and not torch.compiler.is_compiling()  # compilers choose themselves
    if direct and not save_output and _recording is None:  # skip the bookkeeping, which small tensors would feel
        return epilogue.apply(by_torch(), residual, activation, fresh=_is_fresh(spec, details))
    call = Call(spec, x, weight, bias, by_torch, residual=residual, activation=activation, **details)
    _record(call)
    chosen = choose(call, name)
    if save_output and chosen is not REFERENCE and output_saved.applies(call):
        return output_saved.run(call, by_kernel=chosen is NATIVE)
    return chosen.run(call)


def phases(call: Call, backend: str | None = None) -> Callable[..., tuple[Tensor, Any]] | None:
    """What carries out a norm in two halves, between which the caller merges moments (and, backward, sums).

    ``None``: torch's operators under torch's autograd, for whoever wants to see these.
    """
    name = asked(backend)
    if call.residual is not None and call.residual.shape != call.x.shape:
        raise ValueError(_misfit(call.spec, call.x, call.residual))
    _record(call)
    if name == "reference" or halves.watched():
        return None
    chosen = TRITON if name == "triton" or (name == "auto" and _by_triton(call)) else NATIVE
    against = ["asked for by name"] if name == "torch" else chosen.reasons_against(call)
    if name == chosen.name and against:
        raise _Refused(_refusal(call, chosen, against))
    if call.composite:
        return None
    return functools.partial(halves.run, halves.halves_for(call, against, chosen.name))


def _by_triton(call: Call) -> bool:
    return not TRITON.reluctance(call) and not TRITON.reasons_against(call)


def settle(*statistics: Any) -> bool:
    """Move running statistics if all that is proposed is finite, by a kernel: a dozen of torch's operators take longer
    than the rest of a small forward pass. False: no kernel has, and nothing has moved."""
    return native.settle(*statistics) or triton.settle(*statistics)


def proposal(mean: Tensor, var: Tensor, tracked: Tensor | None, skipped: Tensor | None) -> Proposal | None:
    """Copies of running statistics, to be moved and let in; ``None``: not a case for it."""
    if ordinary(mean, var, tracked, skipped):
        return (Uncompiled if loading.module is None else Proposal)(mean, var, tracked, skipped)
    if triton.launchable(mean, var, tracked, skipped):
        return triton.Launched(mean, var, tracked, skipped)
    return None


def straight(
    spec: Spec,
    x: Tensor,
    activation: epilogue.Activation,
    followed: bool,
    backend: str | None,
    *,
    writes: bool,
    by_batch: bool = True,
) -> bool:
    """Whether torch's operators run for sure, so that nothing is left to decide. Not for compilers.

    ``writes``: something is written in place, which nobody may see who records or transforms operators. ``by_batch``:
    by the statistics of the input.
    """
    name = backend or _active
    return (
        (name == "torch" or (name == "auto" and _torch_is_faster(spec, spec.over, x, activation, followed, by_batch)))
        and _recording is None
        and not (writes and native._is_watched())
    )


def by_kernels(call: Call, backend: str | None) -> Tensor | None:
    """The output of a norm by its input, where kernels run for sure; ``None``: not for sure.

    What they move is ``moved``, or without it the running statistics of the call. On a GPU: batch norm only.
    """
    kernels = NATIVE if call.x.is_cpu and call.moved is None else TRITON
    name = backend or _active
    if _recording is not None or not BACKENDS.keys() <= _OURS:
        return None
    if kernels is TRITON and (call.moved is None or not triton.PROVEN):
        return None
    if name != "auto" and name != kernels.name:
        return None
    if name == "auto" and kernels is NATIVE and next(iter(BACKENDS.values())) is not NATIVE:
        return None
    followed = call.residual is not None or call.activation is not None
    try:
        if name == "auto" and _torch_is_faster(call.spec, call.over, call.x, call.activation, followed, True):
            return None
        if kernels is TRITON:
            return None if native._is_watched() else triton.at_once(call)
        return None if native.reasons_against(call) else native.run(call)
    except ERRORS as error:
        if type(error) not in ERRORS:
            raise
        return None  # the long way tells it in its context


def follow(layer: Any, x: Tensor, y: Tensor, residual: Tensor | None, activation: epilogue.Activation) -> Tensor:
    """What follows the norm, written over ``y``, the norm of ``x``; an error is told in its context."""
    try:
        return epilogue.apply(y, residual, activation, fresh=True)
    except ERRORS as error:
        if type(error) not in ERRORS:
            raise
        weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)  # RMS norm has no bias
        raise type(error)(_in_context(error, Call(layer.spec, x, weight, bias, lambda: y))) from error


def may_be_read(number: Tensor) -> bool:
    """Whether Python may look at a number now: it is on the CPU, and nobody records or transforms the operators."""
    return number.is_cpu and not halves.watched()


def _is_fresh(spec: Spec, details: dict[str, Any]) -> bool:
    """Whether what torch's operator gave may be written over.

    No backward pass of a norm that pools needs its output. A transform or a compiler wants to see plain operators.
    """
    return spec.over is not None and "counted" not in details and not halves.watched()


def _torch_at_once(
    spec: Spec,
    x: Tensor,
    activation: epilogue.Activation,
    followed: bool,
    *,
    over: str | None = None,
    batch_statistics: bool = True,
    **_: Any,
) -> bool:
    """Whether torch's operators run without a call being put together for the kernels to look at.

    No kernel is there; or the kernels' own rule says that torch, or a compiler of torch's operators, is faster here.
    """
    if torch.compiler.is_compiling():
        if not x.is_cpu:
            return True  # the Triton kernels are reluctant there
        return loading.module is None or limits.compiler_is_faster(over or spec.over, x, activation, batch_statistics)
    return _torch_is_faster(spec, over or spec.over, x, activation, followed, batch_statistics)


def _torch_is_faster(
    spec: Spec, over: str | None, x: Tensor, activation: epilogue.Activation, followed: bool, by_batch: bool
) -> bool:
    """The same outside compilers."""
    first = next(iter(BACKENDS.values()))
    if first is not NATIVE:
        return first is TORCH
    if not x.is_cpu:
        nobody = BACKENDS.keys() <= _OURS and triton.PROVEN is None
        return nobody or triton.torch_is_faster(x, over)
    if loading.module is None:
        return BACKENDS.keys() <= _OURS
    return limits.torch_is_faster(over, spec.center, x, activation, followed, by_batch)


def asked(by_layer: str | None) -> str:
    """The name that counts: the layer's own, or the one of the surrounding ``nk.backend``."""
    return by_layer or _active


def choose(call: Call, name: str) -> Backend:
    """The backend of this name; for ``auto``, the first that has nothing against the call.

    Raises:
        RuntimeError: the one asked for has reasons against the call.
    """
    if name != "auto":
        chosen = BACKENDS[known(name)]
        if chosen is not REFERENCE and (against := chosen.reasons_against(call)):
            raise _Refused(_refusal(call, chosen, against))
        return chosen
    for backend in BACKENDS.values():
        if not backend.reluctance(call) and not backend.reasons_against(call):
            return backend
    raise AssertionError("the torch backend takes every call")


def known(name: str) -> str:
    """``name`` if it is a backend (or ``auto``); otherwise ValueError with the nearest."""
    if name in BACKENDS or name == "auto":
        return name
    near = difflib.get_close_matches(name, BACKENDS, n=1, cutoff=0.5)
    suggestion = f"  did you mean {near[0]!r}?\n" if near else ""
    raise ValueError(f"there is no backend named {name!r}.\n{suggestion}  choose from: auto, {', '.join(BACKENDS)}")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every norm inside the ``with`` on one backend: ``auto``, ``native``, ``triton``, ``torch`` or ``reference``.

    A backend that cannot run an input raises with its reasons; nothing falls through in silence. A layer's own
    ``backend=`` goes before this one. The setting is one per process, not per thread.
    """
    global _active
    before, _active = _active, known(name)
    try:
        yield
    finally:
        _active = before


class _Recorded(Exception):
    """Ends a layer's forward where a backend would start."""


@contextlib.contextmanager
def recording() -> Iterator[list[Call]]:
    """The first layer that this thread calls inside ends where a backend would start, and so does the block.

    The list holds its call; nothing is computed and nothing is committed.
    """
    global _recording, _recorder
    calls: list[Call] = []
    with _one_at_a_time, contextlib.suppress(_Recorded):
        _recording, _recorder = calls, threading.get_ident()
        try:
            yield calls
        finally:
            _recording = None


def _record(call: Call) -> None:
    if _recording is not None and _recorder == threading.get_ident():
        _recording.append(call)
        raise _Recorded


class _Refused(RuntimeError):
    """A backend that was asked for by name has reasons against the call; its message needs no further context."""


def _misfit(spec: Spec, x: Tensor, residual: Tensor) -> str:
    return (
        f"{spec.name}: the residual has the shape {tuple(residual.shape)}, the input {tuple(x.shape)}.\n"
        "  the residual is added element by element after the affine step: give it the shape of the input"
    )


def _refusal(call: Call, chosen: Backend, against: list[str]) -> str:
    lines = [
        f'{call.spec.name}: backend="{chosen.name}" was asked for and cannot run this input.',
        f"  x {tuple(call.x.shape)} {call.x.dtype} on {call.x.device}",
        f"  {chosen.name}: {'; '.join(against)}",
    ]
    for other in BACKENDS.values():
        if other is not chosen:
            why = other.reasons_against(call)
            lines.append(f"  {other.name}: {'; '.join(why) if why else 'would run it'}")
    return "\n".join(lines)


def _in_context(error: Exception, call: Call) -> str:
    """torch's sentence, then what was asked: the numbers somebody needs who reads the message in a log."""
    parts = [f"input {tuple(call.x.shape)} {call.x.dtype}"]
    if call.over is not None:
        parts.append(f'pattern "{call.over}"')
    if call.weight is not None:
        parts.append(f"weight {tuple(call.weight.shape)} {call.weight.dtype}")
    if call.groups > 1:
        parts.append(f"num_groups={call.groups}")
    lines = [f"{call.spec.name}: {error}", f"  {', '.join(parts)}"]
    per_channel = call.over is not None and "c..." not in call.over
    if per_channel and call.weight is not None and call.x.dim() > 1 and call.weight.numel() != call.x.shape[1]:
        made, given = call.weight.numel(), call.x.shape[1]
        lines.append(
            f"  made for {made} channels, the input has {given} on axis 1: make it for {given}, or move the axes"
        )
    return "\n".join(lines)
