"""Recurrent layers with norms inside: torch's LSTM, GRU and RNN, with batch, layer or RMS norm at every time step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from normkit.blocks.recurrent_loop import Recurrent
from normkit.blocks.token_norms import NormName


class LSTM(Recurrent, nn.LSTM):
    """Long short-term memory with norms at every time step: torch's ``LSTM``, and what ``norm`` adds.

    ``i, f, g, o = norm_x(W_ih x) + b_ih + norm_h(W_hh h) + b_hh``, ``c' = sigmoid(f) c + sigmoid(i) tanh(g)``,
    ``h' = sigmoid(o) tanh(norm_c(c'))``. The norms of input and hidden part have a weight and no bias, which torch's
    biases are; that of the cell has both, and ``c'`` itself goes on unnormalised.

    Args:
        input_size: features of x.
        hidden_size: of the state.
        num_layers: one on top of the other.
        bias: learn ``b_ih``, ``b_hh``, and the bias of the cell's norm.
        batch_first: (n, steps, ...) instead of (steps, n, ...), in and out; states are not concerned.
        dropout: probability, between layers.
        bidirectional: a second layer reads each sequence from its own end.
        proj_size: of the projected state; 0: none.
        device: of parameters and buffers.
        dtype: of the parameters.
        norm: a name as :func:`normkit.create` takes it. ``"batch:per_step:64"``: batch norm with running statistics of
            their own for each of 64 time steps, later ones (in evaluation: later than any that training has reached)
            take the last one's (Cooijmans et al.); ``"batch"``: one set for all steps; ``"layer"``, ``"rms"``; or a
            function of the channels that makes a norm; ``None``: torch's layer as it is.
        placement: ``"all"``; or ``"input"`` for ``norm_x`` alone, with statistics over samples and time steps together
            where they are not per step (Laurent et al.).
        scale: the first weight of all norms; ``None``: 0.1 for norms over the samples with placement ``"all"``, so that
            tanh and its gradient do not saturate, otherwise 1.

    Shapes: input (steps, n, inputs), or (steps, inputs), or a packed sequence; the state (h, c), (layers * directions,
    n, size) each; the output (steps, n, directions * size). ``forward(input, hx=None, *, lengths=None, mask=None)``:
    lengths (n,), or a mask of bool in the layout of the input, True up to each length. What lies behind a length enters
    no statistic and no gradient; the output is 0 there, and the last state is that of the last step that counts.

    Raises:
        ValueError: an unknown norm or placement; lengths that do not fit; a mask with gaps; in training, one sample
            with batch norm that is not per step.

    >>> import torch, normkit as nk
    >>> lstm = nk.LSTM(8, 16, norm="batch:per_step:28")
    >>> y, (h, c) = lstm(torch.randn(28, 4, 8), lengths=[28, 20, 9, 3])
    >>> y.shape, h.shape, bool((y[9:, 2] == 0).all())
    (torch.Size([28, 4, 16]), torch.Size([1, 4, 16]), True)

    ``lstm.on_state = function`` shows every output as it arises, ``function(place, step, h)``; ``h.retain_grad()``
    there keeps the gradient that comes back to this time step by way of all later ones.

    The keys of torch's layer are the same; a checkpoint of torch's layer loads and leaves the norms as they are.

    When not to use it: batch norm where batches are small, or sequences so different in length that few samples reach
    the last steps (one that is alone has no variance, and per step it is normalised by the running statistics): layer
    norm. Under ``torch.compile``, which would unroll the loop.

    Source: Cooijmans et al. 2017, arXiv:1603.09025; Laurent et al. 2016, arXiv:1510.01378 (input only); Ba, Kiros &
    Hinton 2016, arXiv:1607.06450 (layer norm).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        norm: NormName = None,
        placement: str = "all",
        scale: float | None = None,
    ) -> None:
        sizes = (input_size, hidden_size, num_layers)
        super().__init__(*sizes, bias, batch_first, dropout, bidirectional, proj_size, device, dtype)
        self._set_norms(norm, placement, scale, {"device": device, "dtype": dtype})


class GRU(Recurrent, nn.GRU):
    """Gated recurrent unit with norms at every time step: torch's ``GRU``, and what ``norm`` adds.

    With ``d = norm_x(W_ih x) + b_ih``, ``u = norm_h(W_hh h) + b_hh``, each in three parts: ``r, z = sigmoid(d + u)``,
    ``h' = (1 - z) tanh(d_n + r u_n) + z h``.

    Args, shapes, errors and when not to use it: those of :class:`LSTM`, without ``proj_size``; the state is one tensor.

    >>> import torch, normkit as nk
    >>> y, h = nk.GRU(8, 16, norm="layer")(torch.randn(28, 4, 8))
    >>> y[-1].equal(h[0])
    True

    Source: Cooijmans et al. 2017, arXiv:1603.09025, whose LSTM this carries over.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        norm: NormName = None,
        placement: str = "all",
        scale: float | None = None,
    ) -> None:
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        sizes = (input_size, hidden_size, num_layers)
        super().__init__(*sizes, bias, batch_first, dropout, bidirectional, **where)
        self._set_norms(norm, placement, scale, where)


class RNN(Recurrent, nn.RNN):
    """``h' = tanh(norm_x(W_ih x) + b_ih + norm_h(W_hh h) + b_hh)``: torch's ``RNN``, and what ``norm`` adds.

    Args, shapes, errors and when not to use it: those of :class:`LSTM`, without ``proj_size``, and with
    ``nonlinearity``, ``"tanh"`` or ``"relu"``; the state is one tensor.

    >>> import torch, normkit as nk
    >>> nk.RNN(8, 16, norm="rms", nonlinearity="relu", batch_first=True)(torch.randn(4, 28, 8))[0].shape
    torch.Size([4, 28, 16])

    Source: Laurent et al. 2016, arXiv:1510.01378; Cooijmans et al. 2017, arXiv:1603.09025.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        norm: NormName = None,
        placement: str = "all",
        scale: float | None = None,
    ) -> None:
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        sizes = (input_size, hidden_size, num_layers)
        super().__init__(*sizes, nonlinearity, bias, batch_first, dropout, bidirectional, **where)
        self._set_norms(norm, placement, scale, where)
