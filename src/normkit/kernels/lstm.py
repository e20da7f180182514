"""What the gates of an LSTM make of its cell, in one pass: eager calls, their gradients, and the gradients of those."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normkit.kernels import loading, native, phases

_TYPES = (torch.float32, torch.float64)


def step(driven: Tensor, recurrent: Tensor, cell: Tensor) -> tuple[Tensor, Tensor] | None:
    """``c' = sigmoid(f) c + sigmoid(i) tanh(g)`` and ``sigmoid(o)``, with ``i, f, g, o = driven + recurrent``.

    Args:
        driven: (n, 4 h), what comes from the input.
        recurrent: (n, 4 h), what comes from the step before.
        cell: (n, h), of the step before.

    Returns:
        The new cell and the output gate, (n, h) each; ``None`` where the kernel cannot run.
    """
    if loading.module is None or phases.watched():
        return None
    for tensor in (driven, recurrent, cell):
        if type(tensor) is not Tensor or not tensor.is_cpu or tensor.dtype not in _TYPES:
            return None
        if tensor.dtype != cell.dtype or not tensor.is_contiguous():
            return None
    return _Step.apply(driven, recurrent, cell)[:2]


class _Step(torch.autograd.Function):
    """One node in the graph. The gates are outputs as well, so that a second derivative can pass through them."""

    @staticmethod
    def forward(ctx: Any, driven: Tensor, recurrent: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, h = cell.shape
        new, output, gates = torch.empty_like(cell), torch.empty_like(cell), cell.new_empty(n, 3 * h)
        loading.module.lstm_forward(
            cell.dtype == torch.float64,
            n,
            h,
            driven.data_ptr(),
            recurrent.data_ptr(),
            cell.data_ptr(),
            gates.data_ptr(),
            output.data_ptr(),
            new.data_ptr(),
            torch.get_num_threads(),
        )
        ctx.save_for_backward(cell, gates, output)
        ctx.set_materialize_grads(False)
        return new, output, gates

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        cell, gates, output = ctx.saved_tensors
        if grads[2] is not None or torch.is_grad_enabled() or native._is_watched():
            return _differentiable(cell, gates, output, *grads)
        n, h = cell.shape
        dcell, doutput = (None if grad is None else grad.contiguous() for grad in grads[:2])
        dsum, dbefore = cell.new_empty(n, 4 * h), torch.empty_like(cell)
        loading.module.lstm_backward(
            cell.dtype == torch.float64,
            n,
            h,
            cell.data_ptr(),
            gates.data_ptr(),
            output.data_ptr(),
            0 if dcell is None else dcell.data_ptr(),
            0 if doutput is None else doutput.data_ptr(),
            dsum.data_ptr(),
            dbefore.data_ptr(),
            torch.get_num_threads(),
        )
        return dsum, dsum, dbefore


def _differentiable(
    cell: Tensor, gates: Tensor, output: Tensor, dcell: Tensor | None, doutput: Tensor | None, dgates: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same gradients out of torch's operators; ``dgates`` comes only from the derivative of a derivative."""
    dcell = torch.zeros_like(cell) if dcell is None else dcell
    doutput = torch.zeros_like(cell) if doutput is None else doutput
    input, forget, candidate = gates.chunk(3, 1)
    towards = [dcell * candidate, dcell * cell, dcell * input]
    if dgates is not None:
        towards = [own + more for own, more in zip(towards, dgates.chunk(3, 1), strict=True)]
    slopes = (input * (1 - input), forget * (1 - forget), 1 - candidate * candidate)
    parts = [grad * slope for grad, slope in zip(towards, slopes, strict=True)]
    dsum = torch.cat([*parts, doutput * output * (1 - output)], 1)
    return dsum, dsum, dcell * forget
