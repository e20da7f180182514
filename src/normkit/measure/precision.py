"""Precision: what a norm computes in half precision or under autocast, against the same norm in float32."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from normkit.measure.observer import Numbers, Observer, Seen
from normkit.measure.sites import wide
from normkit.measure.structure import kind_of
from normkit.statistics.synchronized import Synchronized
from normkit.vocabulary.quantity import Quantity

ERROR = "arithmetic_error"
QUANTITIES = (
    Quantity(
        ERROR,
        "batch",
        "relative",
        "||y - y'|| / ||y'||, y: what a norm gives for this input as it computes, in half precision or under autocast; "
        "y': the same in float32, rounded to the type of y",
        means="How far the arithmetic of a norm is from float32, beyond the rounding of what it gives.",
    ),
)
_NARROW = (torch.float16, torch.bfloat16)


def observe(seen: Seen, wanted: frozenset[str]) -> Numbers:
    """Runs the layer twice on the input that it is about to get, on copies of its buffers."""
    x = seen.input
    if x is None or not x.is_floating_point() or not (x.dtype in _NARROW or seen.cast) or _exchanges(seen.module):
        return {}
    try:
        y, exact = _run(seen, lambda tensor: tensor, seen.cast), _run(seen, _widened, None)
    except Exception:  # a layer of somebody else's that takes a single type
        return {}
    if not isinstance(y, Tensor) or not isinstance(exact, Tensor) or y.shape != exact.shape or not y.numel():
        return {}
    return {ERROR: _distance(y, exact)}


def _exchanges(module: Any) -> bool:
    """Whether a pass through it waits for other processes."""
    return isinstance(module, nn.SyncBatchNorm) or isinstance(getattr(module, "statistics", None), Synchronized)


class _Bare(nn.Module):
    """The layer without the hooks that are on it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer.forward(*args, **kwargs)


def _run(seen: Seen, converted: Callable[[Tensor], Tensor], cast: tuple[str, torch.dtype] | None) -> Any:
    own = chain(seen.module.named_parameters(), seen.module.named_buffers())
    tensors = {f"layer.{name}": converted(tensor.detach().clone()) for name, tensor in own}
    copy = lambda leaf: converted(leaf.detach().clone()) if isinstance(leaf, Tensor) else leaf
    args, kwargs = pytree.tree_map(copy, (seen.args, dict(seen.kwargs)))
    with torch.autocast(*cast, cache_enabled=False) if cast is not None else contextlib.nullcontext():
        return functional_call(_Bare(seen.module), tensors, args, kwargs)


def _widened(tensor: Tensor) -> Tensor:
    return wide(tensor) if tensor.dtype in _NARROW else tensor


def _distance(y: Tensor, exact: Tensor) -> Tensor:
    """Relative; infinite where the one overflows and the other does not. What both lose counts for nothing."""
    y, exact = wide(y), wide(exact.to(y.dtype))
    counts = exact.isfinite()
    exact = torch.where(counts, exact, 0)
    size = exact.abs().amax().clamp_min(torch.finfo(exact.dtype).tiny)  # so that no square overflows
    off, length = (torch.where(counts, y - exact, 0) / size).norm(), (exact / size).norm()
    return torch.where(length > 0, torch.nan_to_num(off, nan=math.inf, posinf=math.inf) / length, 0.0)


OBSERVER = Observer(QUANTITIES, lambda module: kind_of(module) != "", before=True, read=observe)
