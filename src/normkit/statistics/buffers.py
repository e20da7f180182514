"""Running statistics: how they are kept, and the one place where they move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, is_lazy

from normkit import dispatch
from normkit.moments import Moments
from normkit.statistics.recomputing import first_pass, recomputing

NAMES = ("running_mean", "running_var")


class Pending:
    """Moments that wait for the optimizer's step: of micro-batches that belong to one update."""

    def __init__(self) -> None:
        self.moments: Moments | None = None

    def add(self, moments: Moments) -> None:
        """Merge in the moments of one micro-batch; not when it passes a second time, nor when it is not finite."""
        moments = Moments(moments.count.detach(), moments.mean.detach(), moments.m2.detach())
        finite = moments.m2.max().isfinite() if moments.m2.numel() else torch.tensor(True)
        if torch.compiler.is_compiling():
            first = first_pass(moments.m2)
            finite = finite if first is None else finite & first
        elif recomputing():
            return
        used = Moments(
            torch.where(finite, moments.count, 0),
            torch.where(finite, moments.mean, 0),
            torch.where(finite, moments.m2, 0),
        )
        self.moments = used if self.moments is None else self.moments.merge(used)


@dataclass(slots=True)
class Kept:
    """Running statistics, their counters, and whether they may move."""

    mean: Tensor
    """(c,)."""
    var: Tensor
    """(c,), unbiased."""
    momentum: float | None = 0.1
    """Share of a new batch; ``None``: its share in all values seen so far."""
    tracked: Tensor | None = None
    """How many batches went in."""
    skipped: Tensor | None = None
    """How many were left out."""
    values: Tensor | None = None
    """How many values per channel went in, for ``momentum=None``; 0 where a checkpoint told only of batches."""
    held: bool = False
    """They stay as they are."""
    pending: Pending | None = None
    """They move when the optimizer steps."""

    def pace(self, count: Any) -> tuple[float, Tensor | None]:
        """What torch's operator gets for ``momentum``, and the share of its result that is let in (``None``: all).

        ``count``: values per channel of the batch, or a function that says how many (asked only where it matters).
        """
        if self.pending is not None:
            return 1.0, None
        if self.momentum is not None:
            return self.momentum, None
        return (0.0, None) if self.tracked is None else (1.0, self.share(count() if callable(count) else count))

    def share(self, count: Any) -> Tensor:
        """The share of a batch: the momentum, or its part of all values. A tensor, so that nothing waits for it."""
        if self.momentum is not None:
            return torch.full((), self.momentum, dtype=self.var.dtype, device=self.var.device)
        if self.tracked is None:
            return self.var.new_zeros(())
        before = self.tracked.double() * count
        if self.values is not None:
            before = torch.where(self.values > 0, self.values.double(), before)
        return (count / (before + count).clamp(min=1)).to(self.var.dtype)

    def observe(self, moments: Moments) -> None:
        """Let the moments of a batch in: at once, or when the optimizer steps."""
        if self.pending is not None and not self.held:
            self.pending.add(moments)
            return
        count = moments.count
        self.commit((moments.mean.detach(), moments.var(1).detach()), share=self.share(count), count=count)

    def commit(self, proposed: tuple[Tensor, Tensor], *, share: Tensor | None = None, count: Any = None) -> None:
        """Move mean and variance to what is proposed (``share`` of the way), and count the batch.

        Not where they are held, not in a forward pass that runs inside a backward pass (activation checkpointing), and
        not to a NaN or an infinity; such a batch is counted as skipped. O(channels), and nothing waits for the device:
        a kernel does it where there is one, otherwise torch's operators do, a dozen of them, which small tensors feel.
        Where a batch holds a non-finite value its variance is NaN (or infinite), so the variance alone tells.
        """
        if self.held or not self.var.numel():
            return
        compiling = torch.compiler.is_compiling()
        if not compiling and recomputing():
            return
        if share is None and (settled := dispatch.settle((self.mean, self.var), proposed)) is not None:
            counter = self.tracked if settled else self.skipped
            if counter is not None:
                dispatch.count(counter)
            return
        largest = proposed[1].max()
        difference = largest - largest  # 0, or NaN where the largest is infinite or NaN
        finite = difference.eq(difference)  # cheaper than isfinite, which is four operators
        first = first_pass(self.var) if compiling else None
        moved = finite if first is None else finite & first
        for old, new in zip((self.mean, self.var), proposed, strict=True):
            target = new.to(old.dtype) if share is None else old.lerp(new.to(old.dtype), share.to(old.dtype))
            old.copy_(torch.where(moved, target, old))
        if self.tracked is not None:
            self.tracked.add_(moved)
        if self.values is not None and count is not None:
            most = count.amax() if isinstance(count, Tensor) else count
            self.values.add_((moved * most).to(self.values.dtype))
        if self.skipped is not None:
            left_out = finite.logical_not()
            self.skipped.add_(left_out if first is None else left_out & first)


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

    The counters ``num_batches_skipped`` and ``num_values_tracked`` are not in the ``state_dict``.
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
    num_values_tracked: Tensor | None
    frozen: bool
    """Normalise by the running statistics in training as well, and leave them as they are: :func:`normkit.freeze_`."""
    hold: Hold
    """Who asks at present that the running statistics stay as they are, or that they wait for the optimizer."""

    def _set_statistics(self, low_precision_buffers: bool) -> None:
        self.low_precision_buffers = low_precision_buffers
        self.frozen = False
        self.hold = Hold()
        counter = self.num_batches_tracked
        for name in ("num_batches_skipped", "num_values_tracked"):
            self.register_buffer(name, None if counter is None else torch.zeros_like(counter), persistent=False)
        self._widen_buffers({name: getattr(self, name) for name in NAMES})

    def kept(self) -> Kept | None:
        """The running statistics, to be read and moved; ``None`` where the layer keeps none."""
        mean, var = self.running_mean, self.running_var
        if mean is None or var is None or not self.track_running_stats:
            return None
        return Kept(
            mean,
            var,
            self.momentum,
            self.num_batches_tracked,
            self.num_batches_skipped,
            self.num_values_tracked,
            held=self.frozen or self.hold.frozen > 0,
            pending=self.hold.pending,
        )

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
        if self.num_values_tracked is not None and not is_lazy(self.num_values_tracked):
            self.num_values_tracked.zero_()  # a checkpoint tells of batches only
        self._widen_buffers({name: getattr(self, name) for name in NAMES})  # assign=True brings its own dtype

    def reset_running_stats(self) -> None:
        """Mean 0, variance 1, counters 0."""
        super().reset_running_stats()  # type: ignore[misc]
        for name in ("num_batches_skipped", "num_values_tracked"):
            counter = getattr(self, name, None)  # torch's constructor resets before there is one
            if counter is not None:
                counter.zero_()

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


class Hold:
    """What contexts ask of one layer's running statistics. Never stored: a copy of a layer starts free."""

    def __init__(self) -> None:
        self.frozen = 0
        """How many ``statistics_frozen`` contexts are open."""
        self.pending: Pending | None = None

    def __deepcopy__(self, memo: dict) -> Hold:
        return Hold()

    def __reduce__(self) -> Any:
        return Hold, ()


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
