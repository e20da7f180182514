"""Running statistics: how they are kept, and the one place where they move."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, is_lazy

from normkit import dispatch

NAMES = ("running_mean", "running_var")


def commit(
    running: tuple[Tensor, Tensor], proposed: tuple[Tensor, Tensor], *, weight: Tensor | None = None
) -> Tensor | bool | None:
    """Move the running mean and variance to the proposed ones, unless a NaN or an infinity is among them.

    O(channels), and nothing waits for the device: a kernel does it where there is one, otherwise torch's operators do,
    a dozen of them, which small tensors feel. Where a batch holds a non-finite value its variance is NaN (or
    infinite), so the variance alone tells.

    Args:
        running: mean and variance, changed in place.
        proposed: what they become.
        weight: the share that ``proposed`` has (a cumulative average); ``None``: all of it.

    Returns:
        Whether they moved: a boolean tensor without axes, or a plain one from a kernel; ``None`` when there is no
        channel.
    """
    if not running[1].numel():
        return None
    if weight is None and (settled := dispatch.settle(running, proposed)) is not None:
        return settled
    largest = proposed[1].max()
    difference = largest - largest  # 0, or NaN where the largest is infinite or NaN
    moved = difference.eq(difference)  # cheaper than isfinite, which is four operators
    for old, new in zip(running, proposed, strict=True):
        target = new if weight is None else old.lerp(new, weight.to(old.dtype))
        old.copy_(torch.where(moved, target, old))
    return moved


def as_statistics(
    running_mean: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias in the dtype of the running statistics: torch's CPU kernels want one for all numbers per channel.

    Autograd returns their gradients in their own dtype.
    """
    if running_mean is None:
        return weight, bias
    if weight is not None and weight.dtype != running_mean.dtype:
        weight = weight.to(running_mean.dtype)
    if bias is not None and bias.dtype != running_mean.dtype:
        bias = bias.to(running_mean.dtype)
    return weight, bias


class RunningStatistics(nn.Module):
    """Mixin of batch and instance norm: buffers that stay float32, and a count of the batches that were left out.

    The counter ``num_batches_skipped`` is not in the ``state_dict``.
    """

    num_features: int
    eps: float
    momentum: float | None
    affine: bool
    track_running_stats: bool
    low_precision_buffers: bool
    weight: Any  # torch's classes declare them in their own ways
    bias: Any
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    num_batches_skipped: Tensor | None

    def _set_statistics(self, low_precision_buffers: bool) -> None:
        self.low_precision_buffers = low_precision_buffers
        counter = self.num_batches_tracked
        skipped = None if counter is None else torch.zeros_like(counter)
        self.register_buffer("num_batches_skipped", skipped, persistent=False)
        self._widen_buffers({name: getattr(self, name) for name in NAMES})

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """``.half()``, ``.bfloat16()`` and ``.to(dtype)`` leave the running statistics in float32.

        In bfloat16 a running variance stops moving once its steps are smaller than its last bit.
        """
        before = {name: getattr(self, name) for name in NAMES}
        super()._apply(fn, recurse)
        self._widen_buffers(before)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._widen_buffers({name: getattr(self, name) for name in NAMES})  # assign=True brings its own dtype

    def reset_running_stats(self) -> None:
        """Mean 0, variance 1, counters 0."""
        super().reset_running_stats()  # type: ignore[misc]
        skipped = getattr(self, "num_batches_skipped", None)  # torch's constructor resets before there is one
        if skipped is not None:
            skipped.zero_()

    def _widen_buffers(self, source: dict[str, Tensor | None]) -> None:
        """Make each narrow running statistic float32 again, from the values it had before they were rounded."""
        for name, before in source.items():
            now = getattr(self, name)
            if now is None or before is None or self.low_precision_buffers:
                continue
            wide = torch.promote_types(now.dtype, torch.float32)
            if wide == now.dtype:
                continue
            if is_lazy(now):
                setattr(self, name, UninitializedBuffer(device=now.device, dtype=wide))  # type: ignore[call-arg]
            elif before.device.type == "meta":
                setattr(self, name, torch.empty_like(now, dtype=wide))
            else:
                setattr(self, name, before.to(device=now.device, dtype=wide))

    def _count(self, moved: Tensor | bool | None, *, tracked: bool = True) -> None:
        """Advance ``num_batches_tracked``, or ``num_batches_skipped`` where the batch was left out."""
        counter, skipped = self.num_batches_tracked, self.num_batches_skipped
        if moved is None:
            return
        if isinstance(moved, bool):
            counter = skipped if not moved else counter if tracked else None
            if counter is not None:
                dispatch.count(counter)
            return
        if tracked and counter is not None:
            counter.add_(moved)
        if skipped is not None:
            skipped.add_(moved.logical_not())


class LazyFeatures(nn.Module):
    """Mixin of the lazy layers: parameters and buffers get their size from the first input."""

    def reset_parameters(self) -> None:
        """Nothing, as long as there are no parameters."""
        if not self.has_uninitialized_params():  # type: ignore[operator]
            super().reset_parameters()  # type: ignore[misc]

    def initialize_parameters(self, input: Tensor, **_: Any) -> None:
        """Called by torch before the first forward, with its arguments; ``input`` is (n, c, s...)."""
        if not self.has_uninitialized_params():  # type: ignore[operator]
            loaded: Any = self.weight if self.weight is not None else self.running_mean
            self.num_features = input.shape[1] if loaded is None else loaded.numel()  # torch leaves 0
            return
        self.num_features = input.shape[1]
        for name in ("weight", "bias", *NAMES):
            tensor = getattr(self, name)
            if tensor is not None and is_lazy(tensor):
                tensor.materialize((self.num_features,))
        self.reset_parameters()
