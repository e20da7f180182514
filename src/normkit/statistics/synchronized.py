"""Synchronized: one batch out of the batches of all processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo

from normkit.moments import Moments
from normkit.statistics.application import Application
from normkit.statistics.policy import Policy
from normkit.statistics.pooling import Pooling

LIMIT = 128.0
"""Greatest squared mean, in variances, for which one reduction does in float64: the variance keeps 13 digits."""


@dataclass(frozen=True)
class Synchronized(Policy):
    """Normalise by the batches of all processes together; in evaluation nothing differs from plain batch norm.

    The result is that of one process with the whole batch: outputs, running statistics and the gradient of the input
    (those of weight and bias are this process's part, which DistributedDataParallel adds up as it does all others).
    Processes may have batches of different sizes, or empty ones, and masks: every value counts once. On a CPU with gloo
    as well as on GPUs with NCCL; one all-reduce of 24 bytes per channel forward and one of 16 backward, whatever the
    number of processes. Every process has to run the same layers in training equally often;
    :func:`normkit.statistics.same_calls` finds the one that does not. A world of one is plain batch norm.

    Args:
        process_group: of ``torch.distributed``; ``None``: all processes. A copy of a layer shares it. It cannot be
            stored: a layer that was pickled with one wants it again from :func:`normkit.sync_`.
        required: raise where ``torch.distributed`` is not initialised; otherwise such a process is a world of one, as
            for ``torch.nn.SyncBatchNorm``.
        replaces: what :func:`normkit.unsync_` goes back to; set by :func:`normkit.sync_`.

    Raises:
        TypeError: something that is no process group.
        RuntimeError: in training, where there is no process group, or this process is not in it.

    >>> import torch, normkit as nk
    >>> bn = nk.BatchNorm1d(2, statistics=nk.statistics.Synchronized(required=False))
    >>> bn(torch.randn(8, 2)).shape                    # under torchrun: normalised by the samples of all processes
    torch.Size([8, 2])

    When not to use it: where each process has plenty of values per channel by itself. Every layer waits for the slowest
    process twice per step; docs/distributed.md has the cost.

    Source: Peng et al. 2018, arXiv:1711.07240, who need it for batches of two images per GPU.
    """

    process_group: Any = None
    required: bool = True
    replaces: Any = field(default=None, compare=False)

    def __post_init__(self) -> None:
        group = self.process_group
        if group is None or isinstance(group, Stored) or not dist.is_available():
            return
        if not isinstance(group, dist.ProcessGroup) and group != dist.GroupMember.NON_GROUP_MEMBER:
            raise TypeError(
                f"Synchronized: process_group={group!r} is no process group.\n  make one in every process, as "
                "group = torch.distributed.new_group([0, 1]) for two ranks, and give each the group that it is in"
            )

    def train(self, call: Application) -> Tensor:
        if self.alone():
            return call.by_batch()
        pooling = Ranks(self.process_group, f"{type(call.layer).__name__}: statistics={self!r}")
        return _uncompiled(call, pooling) if torch.compiler.is_compiling() else call.pooled(pooling)

    def evaluate(self, call: Application) -> Tensor:
        """As torch: processes need not evaluate in step, so nothing is communicated, not even without statistics."""
        return call.by_batch() if call.kept is None else super().evaluate(call)

    def alone(self) -> bool:
        """Whether the batch of this process is the whole batch."""
        if not initialised():
            return not self.required
        return not isinstance(self.process_group, Stored) and dist.get_world_size(self.process_group) == 1

    def __repr__(self) -> str:
        group = self.process_group
        if group is not None and not isinstance(group, Stored):
            group = f"<ranks {', '.join(map(str, ranks_of(group)))}>"
        shown = [] if group is None else [f"process_group={group}"]
        shown += [] if self.required else ["required=False"]
        return f"Synchronized({', '.join(shown)})"

    def __deepcopy__(self, memo: dict) -> Synchronized:
        return self

    def __reduce__(self) -> Any:
        group = self.process_group
        if group is not None and not isinstance(group, Stored):
            group = Stored(ranks_of(group))
        return type(self), (group, self.required, self.replaces)


@dataclass(frozen=True)
class Stored:
    """In the place of a process group that was pickled: the ranks that were in it."""

    ranks: tuple[int, ...]


def initialised() -> bool:
    """Whether this process knows others."""
    return dist.is_available() and dist.is_initialized()


def ranks_of(group: Any) -> tuple[int, ...]:
    """The ranks in a group; of none where this process is not in it."""
    return tuple(dist.get_process_group_ranks(group)) if initialised() and dist.get_rank(group) >= 0 else ()


@dataclass
class Ranks(Pooling):
    """Units are channels; those of all ranks of a group belong together."""

    group: Any
    what: str
    """The layer, for messages."""

    def total(self, sums: Tensor) -> Tensor:
        total: Tensor = _Sum.apply(sums, self.group)
        return total

    def merge(self, own: Moments) -> Moments:
        """One reduction of counts, sums and sums of squares in float64, made from the exact moments of each rank.

        The variance of all is then a difference, which loses about twice the digits of |mean| / deviation. For float32
        or narrower input those are digits that the input itself does not have. For float64 input they are made good by
        a second reduction around the mean that all now share; all ranks see the same numbers and decide alike. A shift
        by the running mean would save that, and would be silently wrong where ranks differ in their running means.
        """
        self._check()
        count, mean, m2 = own.count.expand(own.mean.shape), own.mean.double(), own.m2.double()
        total, sums, squares = self.total(torch.stack([count, count * mean, m2 + count * mean.square()]))
        together = sums / total.clamp(min=1)
        merged = (squares - together * sums).clamp(min=0)
        if own.mean.dtype == torch.float64 and bool((together * sums > LIMIT * merged).any()):
            (merged,) = self.total((m2 + count * (mean - together).square())[None])
        return Moments(total, together, merged)

    def _check(self) -> None:
        if not initialised():
            raise RuntimeError(
                f"{self.what} pools the batches of all processes, and torch.distributed is not initialised.\n"
                "  call torch.distributed.init_process_group() before the first training step, in a program started by "
                "torchrun;\n  for one process: statistics=Synchronized(required=False), or normkit.unsync_(model)"
            )
        if isinstance(self.group, Stored):
            raise RuntimeError(
                f"{self.what}: the layer was stored, and its process group cannot be.\n"
                f"  make it anew, as group = torch.distributed.new_group({[*self.group.ranks]}), and give it: "
                "normkit.sync_(model, group)"
            )
        if dist.get_rank(self.group) < 0:
            raise RuntimeError(
                f"{self.what}: rank {dist.get_rank()} is not in this process group.\n"
                "  give each process the group that it is in: normkit.sync_(model, process_group)"
            )


class _Sum(torch.autograd.Function):
    """The sum over all ranks, on every rank. Each rank's gradient is that of all outputs together: the same sum."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = own.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Sum.apply(grads[0], ctx.group), None


_uncompiled = _disable_dynamo(Application.pooled)
"""A compiler breaks its graph here: what waits for other processes is run as it is written."""
