"""Plain batch norm in training, straight to torch's operator or to the kernels: :func:`train` without what has nothing
to decide here.

The same numbers, the same running statistics and the same errors, in about the time of torch's own layer, which small
networks feel (``normkit bench --op overhead``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _current_graph_task_id
from torch.overrides import has_torch_function_unary

from normkit import dispatch
from normkit.call import Call, nobody
from normkit.norm import unambiguous
from normkit.statistics.buffers import RunningStatistics

_PLAIN = (Tensor, nn.Parameter)


def straight(layer: Any, x: Tensor, residual: Tensor | None) -> Tensor | None:
    """The output for (n, c, s...), and the running statistics have moved. ``None``: not such a case, nothing was done.

    ``layer`` trains on the statistics of the mini-batch.
    """
    if torch.compiler.is_compiling() or layer.save != "input":
        return None
    if type(x) not in _PLAIN or layer.momentum is None or layer.eps <= 0 or has_torch_function_unary(x):
        return None
    if _current_graph_task_id() != -1 or x.numel() <= x.shape[1]:  # the former: recomputing
        return None
    if residual is not None and residual.shape != x.shape:
        return None
    parameters = layer._parameters  # torch's access by name costs a microsecond for each
    if "weight" not in parameters or "bias" not in parameters:  # computed, as under parametrize
        return None
    weight, bias = parameters["weight"], parameters["bias"]
    proposal = _proposal(layer, weight, bias)
    if proposal is None:
        return None
    activation, y = layer._modules.get("activation") or layer.activation, None
    followed = residual is not None or activation is not None
    if dispatch.straight(layer.spec, x, activation, followed, layer.backend, writes=True):
        y = _by_batch(layer, x, residual, weight, bias, activation, proposal)
    else:
        y = _on_kernels(layer, x, residual, weight, bias, activation, proposal)
    if y is not None:
        proposal.settle()
    layer.hold.proposal = proposal
    return y


def _by_batch(
    layer: Any, x: Tensor, residual: Tensor | None, weight: Any, bias: Any, activation: Any, proposal: dispatch.Proposal
) -> Tensor | None:
    mean, var = proposal.begin()
    try:
        y = torch.batch_norm(x, weight, bias, mean, var, True, layer.momentum, layer.eps, torch._C._get_cudnn_enabled())
    except dispatch.ERRORS as error:
        if type(error) not in dispatch.ERRORS:
            raise
        return None  # the long way tells it in its context
    if 1 in x.shape:
        y = unambiguous(y)
    if residual is None and activation is None:
        return y
    return dispatch.follow(layer, x, y, residual, activation)


def _on_kernels(
    layer: Any, x: Tensor, residual: Tensor | None, weight: Any, bias: Any, activation: Any, to: dispatch.Proposal
) -> Tensor | None:
    """The kernels for GPUs read the running statistics and write what they propose; those for the CPU move a copy."""
    if residual is not None and type(residual) not in _PLAIN:
        return None
    if to.launches:
        (mean, var), moved = (to.mean, to.var), (to.new_mean, to.new_var)
    elif dispatch.may_be_read(x):
        (mean, var), moved = to.begin(), None
    else:
        return None
    call = Call(
        layer.spec, x, weight, bias, nobody, layer.eps, residual=residual, activation=activation,
        running_mean=mean, running_var=var, moved=moved, momentum=layer.momentum,
    )  # fmt: skip
    return dispatch.by_kernels(call, layer.backend)


def _proposal(layer: Any, weight: Tensor | None, bias: Tensor | None) -> dispatch.Proposal | None:
    """The layer's, for its tensors of now; ``None``: they are held, there are none, or they are no ordinary tensors.

    Nobody else has it meanwhile: another thread, or an activation that calls the layer, makes one of its own.
    """
    if type(layer).kept is not RunningStatistics.kept:  # a subclass says itself what is kept
        return None
    buffers, hold = layer._buffers, layer.hold
    mean, var = buffers.get("running_mean"), buffers.get("running_var")
    if mean is None or var is None or hold.frozen or hold.pending is not None or not layer.track_running_stats:
        return None
    dtype = mean.dtype
    if weight is not None and (type(weight) not in _PLAIN or weight.dtype != dtype):
        return None
    if bias is not None and (type(bias) not in _PLAIN or bias.dtype != dtype):
        return None
    tracked, skipped = buffers["num_batches_tracked"], buffers["num_batches_skipped"]
    made, hold.proposal = hold.proposal, None
    if made is not None and made.is_of(mean, var, tracked, skipped):
        return made
    return dispatch.proposal(mean, var, tracked, skipped)
