"""Plain batch norm in training, straight to torch's operator: :func:`train` without what has nothing to decide here.

The same numbers, the same running statistics and the same errors, in about the time of torch's own layer, which small
networks feel (``normkit bench --op overhead``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normkit import dispatch, epilogue
from normkit.norm import unambiguous
from normkit.statistics.recomputing import recomputing

_PLAIN = (Tensor, nn.Parameter)


def straight(layer: Any, x: Tensor, residual: Tensor | None) -> Tensor | None:
    """The output for (n, c, s...), and the running statistics have moved. ``None``: not such a case, nothing was done.

    ``layer`` trains on the statistics of the mini-batch. Not for compilers.
    """
    own = layer.__dict__  # torch's attribute access costs a microsecond for each
    momentum, eps = own["momentum"], own["eps"]
    if not x.is_cpu or type(x) not in _PLAIN or momentum is None or eps <= 0:
        return None
    activation = layer.activation
    followed = residual is not None or activation is not None
    if not dispatch.straight(layer.spec, x, activation, followed, own["backend"], writes=True):
        return None
    if recomputing() or x.numel() <= x.shape[1] or (residual is not None and residual.shape != x.shape):
        return None
    proposal = _proposal(own)
    if proposal is None:
        return None
    parameters = own["_parameters"]
    weight, bias = parameters["weight"], parameters["bias"]
    for parameter in (weight, bias):
        if parameter is not None and (type(parameter) not in _PLAIN or parameter.dtype != proposal.mean.dtype):
            return None
    mean, var = proposal.begin()
    try:
        y = torch.batch_norm(x, weight, bias, mean, var, True, momentum, eps, torch._C._get_cudnn_enabled())
    except (RuntimeError, ValueError, TypeError):
        return None  # it fails there again, and is told in context
    if 1 in x.shape:
        y = unambiguous(y)
    if followed:
        y = epilogue.apply(y, residual, activation, fresh=True)
    proposal.settle()
    return y


def _proposal(own: dict[str, Any]) -> dispatch.Proposal | None:
    """The layer's, for its tensors of now; ``None``: they are held, there are none, or they are no ordinary tensors."""
    buffers, hold = own["_buffers"], own["hold"]
    mean, var = buffers["running_mean"], buffers["running_var"]
    if mean is None or var is None or hold.frozen or hold.pending is not None or not own["track_running_stats"]:
        return None
    tracked, skipped = buffers["num_batches_tracked"], buffers["num_batches_skipped"]
    if hold.proposal is None or not hold.proposal.is_of(mean, var, tracked, skipped):
        hold.proposal = dispatch.proposal(mean, var, tracked, skipped)
    return hold.proposal
