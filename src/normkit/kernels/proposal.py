"""The running statistics of one layer, copied and let in: what is left of a call's own cost.

In the same memory every time. Fresh copies would lie between the outputs of layers, and with them glibc gives a
megabyte back to the system and asks for it again with every call, which takes longer than the copies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from normkit.kernels import loading


def ordinary(mean: Tensor, var: Tensor, tracked: Tensor | None, skipped: Tensor | None) -> bool:
    """Whether these running statistics are such as compiled code, which sees addresses only, can move."""
    return (
        mean.is_cpu
        and var.is_cpu
        and (tracked is None or tracked.is_cpu)
        and (skipped is None or skipped.is_cpu)
        and plain(mean, var, tracked, skipped)
    )


def plain(mean: Tensor, var: Tensor, tracked: Tensor | None, skipped: Tensor | None) -> bool:
    """The same, wherever they are."""
    return (
        type(mean) is type(var) is Tensor
        and mean.dtype == var.dtype
        and var.dtype in (torch.float32, torch.float64)
        and mean.shape == var.shape
        and mean.is_contiguous()
        and var.is_contiguous()
        and (tracked is None or tracked.dtype == torch.int64)
        and (skipped is None or skipped.dtype == torch.int64)
    )


class Proposal:
    """A copy of mean and variance, which torch's operator moves, and which enters them if it is finite."""

    __slots__ = ("addresses", "kind", "mean", "new_mean", "new_var", "skipped", "tracked", "var", "wide")
    launches = False
    """Kernels for GPUs let the copies in, and can write them as well."""

    def __init__(self, mean: Tensor, var: Tensor, tracked: Tensor | None, skipped: Tensor | None) -> None:
        self.mean, self.var, self.tracked, self.skipped = mean, var, tracked, skipped
        with torch.inference_mode(False):  # a layer may be called there first, and trained afterwards
            self.new_mean, self.new_var = torch.empty_like(mean), torch.empty_like(var)
        self.wide = var.dtype == torch.float64
        self.kind = var.dtype, var.numel(), var.get_device()

    def is_of(self, mean: Tensor, var: Tensor, tracked: Tensor | None, skipped: Tensor | None) -> bool:
        """Whether it was made for these, as they are: ``.data =`` and ``resize_`` change what stays the same tensor."""
        dtype, count, device = self.kind
        return (
            mean is self.mean
            and var is self.var
            and tracked is self.tracked
            and skipped is self.skipped
            and mean.dtype == var.dtype == dtype
            and mean.numel() == var.numel() == count
            and mean.get_device() == var.get_device() == device
            and mean.is_contiguous()
            and var.is_contiguous()
            and (tracked is None or (tracked.dtype == torch.int64 and tracked.get_device() == device))
            and (skipped is None or (skipped.dtype == torch.int64 and skipped.get_device() == device))
        )

    def begin(self) -> tuple[Tensor, Tensor]:
        """The copies, as the running statistics are now.

        Nothing tells autograd of the change: an earlier forward pass has saved the same tensors, as that of torch's
        layer saves the running statistics themselves, and no backward pass in training reads them.
        """
        # addresses are asked for every time: share_memory() and .data move what stays the same tensor
        self.addresses = self.new_mean.data_ptr(), self.new_var.data_ptr()  # until it settles
        loading.module.propose(self.wide, self.mean.data_ptr(), self.var.data_ptr(), *self.addresses, self.kind[1])
        return self.new_mean, self.new_var

    def settle(self) -> None:
        """Let the copies in if every variance is finite, and count the batch."""
        tracked, skipped = self.tracked, self.skipped
        loading.module.settle(
            self.wide,
            self.mean.data_ptr(),
            self.var.data_ptr(),
            *self.addresses,
            self.kind[1],
            0 if tracked is None else tracked.data_ptr(),
            0 if skipped is None else skipped.data_ptr(),
        )


class Uncompiled(Proposal):
    """The same in torch's operators, without compiled code. On the CPU nothing waits for a number that Python reads."""

    __slots__ = ()

    def begin(self) -> tuple[Tensor, Tensor]:
        """The copies, as the running statistics are now; behind ``.data``, nothing tells autograd either."""
        self.new_mean.data.copy_(self.mean)
        self.new_var.data.copy_(self.var)
        return self.new_mean, self.new_var

    def settle(self) -> None:
        """Let the copies in if every variance is finite, and count the batch."""
        finite = math.isfinite(self.new_var.max().item())
        if finite:
            self.mean.copy_(self.new_mean)
            self.var.copy_(self.new_var)
        counter = self.tracked if finite else self.skipped
        if counter is not None:
            counter.add_(1)
