"""One time step of each kind of recurrent layer, as torch computes it, with norms on the recurrent part and the cell.

``driven`` is all that comes from the input, and ``recurrent`` all that comes from the state before, both (n, gates).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from normkit import dispatch
from normkit.kernels import lstm as fused_lstm

State = tuple[Tensor, ...]
"""What one step hands to the next, (n, hidden) each: the output first; an LSTM's cell second."""
CellNorm = Callable[[Tensor], Tensor]


def lstm(driven: Tensor, recurrent: Tensor, state: State, cell_norm: CellNorm) -> State:
    """``c' = f c + i g`` and ``h' = o tanh(norm(c'))``; gates in the order i, f, g, o."""
    fused = fused_lstm.step(driven, recurrent, state[1]) if dispatch.asked(None) in ("auto", "native") else None
    if fused is not None:
        cell, output = fused
        return output * torch.tanh(cell_norm(cell)), cell
    input, forget, candidate, output = (driven + recurrent).chunk(4, 1)
    cell = torch.sigmoid(forget) * state[1] + torch.sigmoid(input) * torch.tanh(candidate)
    return torch.sigmoid(output) * torch.tanh(cell_norm(cell)), cell


def gru(driven: Tensor, recurrent: Tensor, state: State, cell_norm: CellNorm) -> State:
    """``h' = (1 - z) tanh(d_n + r u_n) + z h``; gates in the order r, z, n."""
    width = state[0].shape[1]
    reset, update = torch.sigmoid(driven[:, : 2 * width] + recurrent[:, : 2 * width]).chunk(2, 1)
    candidate = torch.tanh(driven[:, 2 * width :] + reset * recurrent[:, 2 * width :])
    return (candidate + update * (state[0] - candidate),)


def rnn_tanh(driven: Tensor, recurrent: Tensor, state: State, cell_norm: CellNorm) -> State:
    """``h' = tanh(d + u)``."""
    return (torch.tanh(driven + recurrent),)


def rnn_relu(driven: Tensor, recurrent: Tensor, state: State, cell_norm: CellNorm) -> State:
    """``h' = relu(d + u)``."""
    return (torch.relu(driven + recurrent),)


STEPS: dict[str, Callable[[Tensor, Tensor, State, CellNorm], State]] = {
    "LSTM": lstm,
    "GRU": gru,
    "RNN_TANH": rnn_tanh,
    "RNN_RELU": rnn_relu,
}
"""By torch's ``mode``."""
