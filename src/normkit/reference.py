"""The slow exact implementation: the oracle that every backend is held against.

Any pooled norm in fifteen lines of plain arithmetic, in float64, differentiated by autograd. It calls no norm of torch
and shares no code of a norm with a backend. The residual and the activation that follow are those of ``epilogue``; the
tests write them by hand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from normkit.epilogue import apply
from normkit.layout import solve

if TYPE_CHECKING:
    from normkit.call import Call


def run(call: Call) -> Tensor:
    """The norm of ``call`` on its input; running statistics are updated as torch updates them."""
    if call.reference is not None:
        return apply(call.reference(), call.residual, call.activation)
    assert call.over is not None
    layout = solve(call.over, tuple(call.x.shape), groups=call.groups, trailing=call.trailing)
    x = call.x.double().reshape(layout.view)
    kept = [size if axis not in layout.pooled else 1 for axis, size in enumerate(layout.view)]
    if call.batch_statistics:
        values = torch.full(kept, float(layout.values), dtype=x.dtype, device=x.device)
        average = lambda t: t.mean(layout.pooled, keepdim=True)
        if call.counted is not None:
            counted = call.counted.expand(call.x.shape).reshape(layout.view)
            values = counted.double().sum(layout.pooled, keepdim=True)
            average = lambda t: (t * counted).sum(layout.pooled, keepdim=True) / values.clamp(min=1)
        mean = average(x) if call.spec.center else torch.zeros(kept, dtype=x.dtype, device=x.device)
        var = average((x - mean).square())
        _move_running(call, mean, var, values)
        var = torch.where(values > 0, var, 1)
    else:
        assert call.running_mean is not None
        assert call.running_var is not None
        mean, var = (s.double().reshape(layout.weight_view) for s in (call.running_mean, call.running_var))
    y = (x - mean) / torch.sqrt(var + call.eps)
    if call.weight is not None:
        y = y * call.weight.double().reshape(layout.weight_view)
    if call.bias is not None:
        y = y + call.bias.double().reshape(layout.weight_view)
    if call.counted is not None:
        y = torch.where(counted, y, 0)
    return apply(y.reshape(call.x.shape).to(call.x.dtype), call.residual, call.activation)


@torch.no_grad()
def _move_running(call: Call, mean: Tensor, var: Tensor, values: Tensor) -> None:
    """running = (1 - momentum) * running + momentum * batch, with the unbiased variance; instances are averaged.

    Under a mask, those instances that have a mean (one value), and those that have a variance (two).
    """
    if call.running_mean is None or call.running_var is None or not call.x.numel():
        return
    if call.counted is None and values.max() == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {call.x.shape}")
    unbiased = var * (values / (values - 1))
    for running, batch, least in ((call.running_mean, mean, 1), (call.running_var, unbiased, 2)):
        enough = (values >= least).expand(batch.shape).reshape(-1, running.numel())
        pooled = torch.where(enough, batch.reshape(enough.shape), 0).sum(0) / enough.sum(0)
        running.copy_((1 - call.momentum) * running.double() + call.momentum * pooled)
