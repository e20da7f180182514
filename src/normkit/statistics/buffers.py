"""Running statistics: how they are kept, and where they move (but for the short cut of plain batch norm)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, is_lazy

from normkit import dispatch
from normkit.moments import Moments
from normkit.statistics.recomputing import first_pass, recomputing

NAMES = ("running_mean", "running_var")


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
    key: Any = None
    """Which of the layer's statistics they are, where it keeps several: a step, a domain."""
    also: Kept | None = None
    """The layer's own, which the same moments enter, where these are of one step or domain."""
    spread: bool = True
    """The variance is that of all values together; otherwise the average of variances, as instance norm keeps it."""

    @property
    def still(self) -> bool:
        """Nothing may move: they are held, there are none, or the forward pass runs inside a backward pass.

        Asked before anything is computed for the running statistics: a recomputing forward may do without an operator
        of the first one, but selective checkpointing refuses one that the first had not, as a context that was open
        then and is not now would bring in. Compiled code asks when it runs, by ``first_pass``.
        """
        return self.held or (not torch.compiler.is_compiling() and recomputing()) or not self.var.numel()

    def pace(self, count: Callable[[], int]) -> tuple[float, Tensor | None]:
        """What torch's operator gets for ``momentum``, and the share of its result that is let in (``None``: all).

        ``count`` says how many values per channel the batch has; it is asked only where that matters.
        """
        if self.pending is not None or self.also is not None:
            return 1.0, None
        if self.momentum is not None:
            return self.momentum, None
        if self.tracked is None:
            return 0.0, None
        if self.still:
            return 1.0, None
        share = self.share(count())
        return (share.item(), None) if dispatch.may_be_read(share) else (1.0, share)

    def share(self, count: Any) -> Tensor:
        """The share of a batch: the momentum, or its part of all values. A tensor, so that nothing waits for it."""
        if self.momentum is not None:
            return torch.full((), self.momentum, dtype=self.var.dtype, device=self.var.device)
        if self.tracked is None:
            return self.var.new_zeros(())
        return count / (self._seen(count) + count).clamp(min=1)

    def _seen(self, count: Any) -> Tensor:
        """How many values went in; a checkpoint tells of batches only, which count as much as this one."""
        assert self.tracked is not None
        as_this = self.tracked.double() * count
        return as_this if self.values is None else torch.where(self.values > 0, self.values.double(), as_this)

    def observe(self, moments: Moments) -> None:
        """Let the moments of a batch in: at once, or when the optimizer steps."""
        if self.also is not None:
            self.also.observe(moments)
        if self.still:
            return
        if self.pending is None:
            self.commit(moments.unbiased(), share=self.share(moments.count), count=moments.count)
        else:
            waiting_for(self).add(moments, self)

    def approach(self, mean: Tensor, var: Tensor) -> None:
        """As :meth:`observe`, at once and by the momentum, for who has the batch's own mean and unbiased variance.

        A recurrent network calls a layer at every step, so that every operator here is one per step.
        """
        for kept in (self.also, self):
            if kept is not None and kept.momentum is not None and not kept.still:
                towards = lambda old, new: old.lerp(new.to(old.dtype), kept.momentum)  # noqa: B023
                kept.commit((towards(kept.mean, mean), towards(kept.var, var)))

    def commit(self, proposed: tuple[Tensor, Tensor], *, share: Tensor | None = None, count: Any = None) -> None:
        """Move mean and variance to what is proposed (``share`` of the way), and count the batch.

        Not where they are held, not in a forward pass that runs inside a backward pass (activation checkpointing), and
        not to a NaN or an infinity; such a batch is counted as skipped. O(channels), and nothing waits for the device:
        a kernel does it where there is one, otherwise torch's operators do, a dozen of them, which small tensors feel.
        ``count``: values per channel, for ``momentum=None``.
        """
        if self.still:
            return
        weighted = self.momentum is None and count is not None
        if (
            share is None
            and not weighted
            and dispatch.settle(self.mean, self.var, *proposed, self.tracked, self.skipped)
        ):
            return
        self._move(proposed, share, count if weighted else None, self._first())

    def store(self, place: Tensor, value: Tensor) -> None:
        """Put a value beside the running statistics, where and when these may move: see :meth:`commit`."""
        if self.still:
            return
        moved, first = value.isfinite().all(), self._first()
        moved = moved if first is None else moved & first
        place.copy_(torch.where(moved, value, place))

    def _first(self) -> Tensor | None:
        """In compiled code, whether this is not a recomputing forward; ``None``: it is not, see :attr:`still`."""
        return first_pass(self.var) if torch.compiler.is_compiling() else None

    def _move(
        self, proposed: tuple[Tensor, Tensor], share: Tensor | None, count: Any, first: Tensor | None = None
    ) -> None:
        """Where a batch holds a non-finite value its variance is NaN (or infinite), so the variance alone tells."""
        largest = proposed[1].max()
        difference = largest - largest  # 0, or NaN where the largest is infinite or NaN
        finite = difference.eq(difference)  # cheaper than isfinite, which is four operators
        moved = finite if first is None else finite & first
        for old, new in zip((self.mean, self.var), proposed, strict=True):
            target = new.to(old.dtype) if share is None else old.lerp(new.to(old.dtype), share.to(old.dtype))
            old.copy_(torch.where(moved, target, old))
        if self.tracked is not None:
            if self.values is not None and count is not None:
                most = count.amax() if isinstance(count, Tensor) else count
                total = self._seen(most) + most
                self.values.copy_(torch.where(moved, total, self.values.double()))
            self.tracked.add_(moved)
        if self.skipped is not None:
            left_out = finite.logical_not()
            self.skipped.add_(left_out if first is None else left_out & first)


class Waiting:
    """Moments that wait for the optimizer's step: of micro-batches that belong to one update.

    Tensors that are made once and then change in place, so that compiled code does here what eager code does.
    """

    def __init__(self, kept: Kept) -> None:
        self.kept = kept
        zeros = lambda: torch.zeros(kept.mean.shape, dtype=torch.float64, device=kept.mean.device)
        self.moments = (zeros(), zeros(), zeros())

    def add(self, moments: Moments, kept: Kept) -> None:
        """Merge in one micro-batch; one that is not finite is counted as skipped instead."""
        if not torch.compiler.is_compiling():
            self.kept = kept
        first = kept._first()
        finite = moments.m2.detach().double().sum().isfinite()
        used = finite if first is None else finite & first
        if kept.skipped is not None:
            left_out = finite.logical_not()
            kept.skipped.add_(left_out if first is None else left_out & first)
        taken = [torch.where(used, t.detach().double(), 0) for t in (moments.count, moments.mean, moments.m2)]
        before, new = Moments(*self.moments), Moments(*taken)
        merged = before.merge(new)
        m2 = merged.m2 if kept.spread else before.m2 + new.m2
        for old, now in zip(self.moments, (merged.count, merged.mean, m2), strict=True):
            old.copy_(now)

    def let_in(self, kept: Kept) -> None:
        """Move the running statistics once, by all that waits; an update without a batch moves nothing."""
        pooled = Moments(*self.moments)
        proposed = pooled.unbiased() if kept.spread else (pooled.mean, pooled.var())
        share, count = kept.share(pooled.count), pooled.count if kept.momentum is None else None
        replace(kept, skipped=None)._move(proposed, share, count)
        for waiting in self.moments:
            waiting.zero_()


Pending = dict[Any, Waiting]
"""By ``Kept.key``: what waits, for each set of running statistics that a layer keeps."""


def waiting_for(kept: Kept) -> Waiting:
    """Where the moments for these statistics wait."""
    assert kept.pending is not None
    waiting = kept.pending.get(kept.key)
    if waiting is None or waiting.moments[0].device != kept.mean.device:  # the model has been moved since
        waiting = kept.pending[kept.key] = Waiting(kept)
    return waiting


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
    frozen_parameters: tuple[str, ...]
    """Those that trained until :func:`normkit.freeze_` stopped them, and will again."""
    hold: Hold
    """Who asks at present that the running statistics stay as they are, or that they wait for the optimizer."""

    def _set_statistics(self, low_precision_buffers: bool) -> None:
        self.low_precision_buffers = low_precision_buffers
        self.frozen = False
        self.frozen_parameters = ()
        self.hold = Hold()
        counter = self.num_batches_tracked
        for name in ("num_batches_skipped", "num_values_tracked"):
            self.register_buffer(name, None if counter is None else torch.zeros_like(counter), persistent=False)
        self._widen_buffers({name: getattr(self, name) for name in NAMES})

    def kept(self) -> Kept | None:
        """The running statistics, to be read and moved; ``None`` where the layer keeps none."""
        own, hold = self._buffers, self.hold  # torch's attribute access costs a microsecond for each
        mean, var = own["running_mean"], own["running_var"]
        if mean is None or var is None or not self.track_running_stats:
            return None
        return Kept(
            mean,
            var,
            self.momentum,
            own["num_batches_tracked"],
            own["num_batches_skipped"],
            own["num_values_tracked"],
            held=self.frozen or hold.frozen > 0,
            pending=hold.pending,
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
    """What contexts ask of one layer's running statistics, and copies of them. Never stored: a copy starts free."""

    def __init__(self) -> None:
        self.frozen = 0
        """How many ``statistics_frozen`` contexts are open."""
        self.pending: Pending | None = None
        """What waits for the optimizer, while :func:`normkit.accumulate_statistics` is on."""
        self.reference = 0
        """How many samples at the head of every batch are :func:`normkit.reference_batch`'s."""
        self.proposal: dispatch.Proposal | None = None
        """Copies of the running statistics, for calls that go straight to torch's operator."""

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
