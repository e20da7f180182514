"""Who is timed: normkit's Triton kernels, torch eager with and without cuDNN, torch.compile, and what is installed."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rows import Row
from torch import Tensor, nn

from normkit.bench.inputs import Inputs, weight_dtype
from normkit.bench.peers import EPS, Peer, eager, layer, ours

OURS, COMPILED, COMPILED_IN_GRAPHS = "normkit", "normkit, compiled", "normkit, compiled, CUDA graphs"
UNASKED = "normkit, auto"
"""What somebody gets who asks for no backend."""
Maker = Callable[[], Peer]


def contenders(row: Row, given: Inputs) -> Iterator[tuple[str, Maker]]:
    """Names and what makes them: those that a goal speaks of."""
    case, kind, device = row.case, _kind(row), str(given.x.device)
    yield OURS, lambda: ours(case, kind, given, "triton")
    yield "torch", lambda: eager(case, kind, device)
    if not row.brief:
        yield "torch.compile", lambda: _compiled(row, kind, device, None)


def further(row: Row, given: Inputs) -> Iterator[tuple[str, Maker]]:
    """All others, for the time that is left."""
    case, kind, device = row.case, _kind(row), str(given.x.device)
    if row.brief:
        return
    if case.norm == "batch":
        yield "torch without cuDNN", lambda: _without_cudnn(eager(case, kind, device))
    if case.features_last and case.activation is None and not case.residual:
        for name, make in EXTERNAL.items():
            yield name, lambda make=make: _external(make, row, kind, device)  # type: ignore[misc]
    yield "torch.compile, autotuned", lambda: _compiled(row, kind, device, "max-autotune-no-cudagraphs")


def _kind(row: Row) -> torch.dtype:
    """Of the parameters; of group norm the input's, because on a GPU torch refuses to mix them."""
    name = row.dtype if row.case.spec.name == "group_norm" else weight_dtype(row.case, row.dtype)
    kind: torch.dtype = getattr(torch, name)
    return kind


def _compiled(row: Row, kind: torch.dtype, device: str, mode: str | None) -> Peer:
    plain = eager(row.case, kind, device, in_place=False)
    call = torch.compile(plain.call, fullgraph=True, dynamic=False, mode=mode)
    return Peer("torch.compile", call, plain.layer)


def _without_cudnn(peer: Peer) -> Peer:
    def call(x: Tensor, residual: Tensor | None) -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):
            return peer.call(x, residual)

    return Peer("torch without cuDNN", call, peer.layer)


class Absent(Exception):
    """Not installed here, or has nothing for this case."""


def _external(make: Callable[[Any, nn.Module], Callable[[Tensor], Tensor]], row: Row, kind: Any, device: str) -> Peer:
    own = layer(row.case, kind, device)
    call = make(row, own)
    return Peer("external", lambda x, residual: call(x), own)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken installation is absent too
        raise Absent(f"{name}: {type(error).__name__}: {str(error)[:120]}") from None


def _liger(row: Row, own: Any) -> Callable[[Tensor], Tensor]:
    if row.case.norm == "rms":
        function = _module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
        return lambda x: function.apply(x, own.weight, EPS)
    function = _module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    return lambda x: function.apply(x, own.weight, own.bias, EPS)


def _quack(row: Row, own: Any) -> Callable[[Tensor], Tensor]:
    if row.case.norm != "rms":
        raise Absent("QuACK: timed for RMS norm only")
    function = _module("quack").rmsnorm
    return lambda x: function(x, own.weight, eps=EPS)


def _flash_attention(row: Row, own: Any) -> Callable[[Tensor], Tensor]:
    function = _module("flash_attn.ops.triton.layer_norm").layer_norm_fn
    rms = row.case.norm == "rms"
    return lambda x: function(x, own.weight, None if rms else own.bias, eps=EPS, is_rms_norm=rms)


EXTERNAL = {"Liger": _liger, "QuACK": _quack, "flash-attention": _flash_attention}


@contextlib.contextmanager
def forgetting() -> Iterator[None]:
    """What was compiled for a row is not wanted for the next one."""
    try:
        yield
    finally:
        torch.compiler.reset()
