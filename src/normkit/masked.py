"""Any pooled norm over the values that a mask lets in: the pattern says which axes, Moments measure what counts.

In torch's operators, under torch's autograd. Where all values that share their statistics are in or out together, as in
layer norm over padded tokens, a mask changes no statistic, and the backends run as they always do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from normkit.layout import roles
from normkit.moments import Moments

if TYPE_CHECKING:
    from normkit.call import Call


def divides(call: Call, mask: Tensor) -> bool:
    """Whether some statistic that is used is not what it would be without the mask.

    That is so where values that count share it with values that do not; where it enters the running statistics, which
    must not hear of what is left out; and where nothing saves the zeros in the place of what is left out from 0 / 0.
    Not where the input does not fit: torch's operator will say why.
    """
    assert call.over is not None
    pooled, weighted, _ = roles(call.over, call.x.dim(), call.trailing)
    if not call.batch_statistics or not _fits(call, weighted):
        return False
    keep = _opened(mask, call, weighted)
    return call.running_mean is not None or any(keep.shape[axis] != 1 for axis in pooled) or bool(call.eps <= 0)


def normalised(call: Call) -> Tensor:
    """Normalised, scaled and shifted, 0 where nothing counts; running statistics move in place, as torch moves them."""
    assert call.over is not None
    assert call.counted is not None
    pooled, weighted, _ = roles(call.over, call.x.dim(), call.trailing)
    x, keep = _opened(call.x, call, weighted), _opened(call.counted, call, weighted)
    own = Moments.measure(x, pooled, keep)
    if call.running_mean is not None:
        _move_running(call, own)
    mean, count = _spread(own.mean, pooled), _spread(own.count, pooled)
    var = _spread(own.m2, pooled) / count.clamp(min=1).to(own.m2.dtype)
    wide = x.to(mean.dtype)
    if call.spec.center:
        wide = wide - mean
    else:
        var = var + mean.square()
    z = wide * torch.rsqrt(torch.where(count > 0, var + call.eps, 1))
    view = [x.shape[axis] if axis in weighted else 1 for axis in range(x.dim())]
    if call.weight is not None:
        z = z * call.weight.reshape(view)
    if call.bias is not None:
        z = z + call.bias.reshape(view)
    y = torch.where(keep, z, 0).to(call.x.dtype)
    return y.flatten(weighted[0], weighted[0] + 1) if y.dim() > call.x.dim() else y


def _opened(t: Tensor, call: Call, weighted: tuple[int, ...]) -> Tensor:
    """The input, or a mask that broadcasts against it, with the parentheses of the pattern opened."""
    assert call.over is not None
    if "(" not in call.over:
        return t
    axis = weighted[0]
    return t.unsqueeze(axis) if t.shape[axis] == 1 else t.unflatten(axis, (call.groups, -1))


def _spread(t: Tensor, pooled: tuple[int, ...]) -> Tensor:
    """With the pooled axes again."""
    for axis in pooled:
        t = t.unsqueeze(axis)
    return t


def _fits(call: Call, weighted: tuple[int, ...]) -> bool:
    if call.sizes is not None:
        return call.sizes == tuple(call.x.shape[axis] for axis in weighted)
    return call.groups > 0 and call.x.shape[weighted[0]] % call.groups == 0


@torch.no_grad()
def _move_running(call: Call, own: Moments) -> None:
    """The average over the instances that have a mean (one value) and a variance (two); NaN where none has."""
    for running, each, least in ((call.running_mean, own.mean, 1), (call.running_var, own.var(1), 2)):
        if running is not None:
            enough = own.count.expand_as(each) >= least
            average = torch.where(enough, each, 0).reshape(-1, running.numel()).sum(0)
            average = average / enough.reshape(-1, running.numel()).sum(0)
            running.lerp_(average.to(running.dtype), call.momentum)
