"""Norms of tokens, (..., c): by the names of ``nk.create`` and of this folder, on the tokens that are no padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from normkit.blocks.rep_batch_norm import ProgressiveRepBatchNorm, RepBatchNorm
from normkit.create import Name, create

NormName = Name | Callable[[int], nn.Module]
"""How layers are told their norm: by a name, or by a function of the number of channels."""
REP, PROGRESSIVE = "rep", "progressive"


def token_norm(name: NormName, channels: int, **options: Any) -> nn.Module:
    """A norm by its name: ``"rep"``, ``"progressive:2000"`` (steps), ``"progressive:2000:100"`` (and warm-up), or a
    name of :func:`normkit.create`; or a function of the channels that makes one. Options that this norm does not know
    are left out, and a function gets none.

    Raises:
        ValueError: no such norm, or no number where one is due.
    """
    if callable(name):
        return name(channels)
    kind, *numbers = name.lower().split(":") if isinstance(name, str) else ("",)
    if kind == REP and not numbers:
        return RepBatchNorm(channels, **_known(RepBatchNorm, options))
    if kind == PROGRESSIVE:
        if not 1 <= len(numbers) <= 2 or not all(number.isdigit() for number in numbers):
            raise ValueError(f"{name!r}: write progressive:STEPS or progressive:STEPS:WARMUP, in batches")
        schedule: dict[str, Any] = dict(zip(("steps", "warmup"), map(int, numbers), strict=False))
        return ProgressiveRepBatchNorm(channels, **schedule, **_known(ProgressiveRepBatchNorm, options))
    return create(name, channels, dim=1, **_known(type(create(name, channels, dim=1)), options))


def over_tokens(norm: nn.Module, x: Tensor, keep: Tensor | None = None) -> Tensor:
    """The norm of (..., c), every token a sample; ``keep``: (...), True where a token is no padding.

    Norms of single tokens need not know of padding, and others put zeros there.
    """
    spec: Any = getattr(norm, "spec", None)
    over = None if spec is None else spec.over
    if over is not None and over.startswith("n..."):
        return norm(x)
    rows = x.flatten(0, -2)
    over_samples = isinstance(norm, RepBatchNorm | ProgressiveRepBatchNorm) or (over is not None and "[n]" in over)
    y = norm(rows, mask=keep.flatten()) if keep is not None and over_samples else norm(rows)
    return y.view(x.shape)


def _known(kind: type, options: dict[str, Any]) -> dict[str, Any]:
    known = inspect.signature(kind).parameters
    return {name: value for name, value in options.items() if name in known}
