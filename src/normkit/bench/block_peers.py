"""What normkit's blocks are held against: torch's layers with torch's norms in them, and an LSTM written out.

All of them borrow their parameters from a block of normkit, so that gradients can be compared one by one.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normkit as nk


class Rows(nn.Module):
    """A norm of (rows, c) on tokens (..., c), as people write it around torch's batch norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, -2)).view_as(x)


def torchs_transformer(block: Any) -> Any:
    """torch's layer with the parameters of a block and torch's norm of the same kind in the place of its own.

    Where torch has none of that kind it is normkit's.
    """
    attention = block.self_attn
    sizes = (attention.embed_dim, attention.num_heads, block.linear1.out_features, block.dropout.p)
    kind = nn.TransformerDecoderLayer if hasattr(block, "multihead_attn") else nn.TransformerEncoderLayer
    layer: Any = kind(*sizes, block.activation, batch_first=attention.batch_first, norm_first=block.norm_first)
    for name, module in block.named_children():
        if name.startswith("norm"):
            setattr(layer, name, _torchs_norm(module))
        elif isinstance(getattr(layer, name, None), nn.Linear | nn.MultiheadAttention):
            setattr(layer, name, module)
    if block.ffn_norm is not None:
        layer.linear1 = nn.Sequential(block.linear1, _torchs_norm(block.ffn_norm))
    return layer


def _torchs_norm(norm: nn.Module) -> nn.Module:
    """torch's norm with the parameters of normkit's."""
    width: int = getattr(norm, "weight", torch.empty(0)).numel()
    if isinstance(norm, nk.BatchNorm1d):
        made: nn.Module = nn.BatchNorm1d(width, norm.eps, norm.momentum)
    elif isinstance(norm, nk.LayerNorm):
        made = nn.LayerNorm(width, norm.eps)
    elif isinstance(norm, nk.RMSNorm):
        made = nn.RMSNorm(width, norm.eps)
    else:
        return Rows(_twin(norm))
    for name, parameter in norm.named_parameters():
        setattr(made, name, parameter)
    return Rows(made) if isinstance(made, nn.BatchNorm1d) else made


def _twin(norm: nn.Module) -> nn.Module:
    """The norm with the same parameters, and running statistics of its own."""
    return copy.deepcopy(norm, {id(parameter): parameter for parameter in norm.parameters()})


class LoopedLSTM(nn.Module):
    """``nk.LSTM`` with norms, of one layer, from torch's functions: step by step, nothing hoisted out."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """(steps, n, inputs) -> (steps, n, units)."""
        own, norms = self.layer, self.layer.norms["l0"]
        of_input = x @ own.weight_ih_l0.T
        if own.norm == "batch":  # whose statistics are those of all samples and steps
            of_input = self._normalised(norms["input"].norm, of_input.flatten(0, 1)).view_as(of_input)
        h = c = x.new_zeros(x.shape[1], own.hidden_size)
        outputs = []
        for driven in of_input.unbind(0):
            recurrent = h @ own.weight_hh_l0.T
            if own.norm != "batch":
                driven = self._normalised(norms["input"].norm, driven)
            if "hidden" in norms:
                recurrent = self._normalised(norms["hidden"].norm, recurrent)
            i, f, g, o = (driven + recurrent + own.bias_ih_l0 + own.bias_hh_l0).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * (self._normalised(norms["cell"].norm, c) if "cell" in norms else c).tanh()
            outputs.append(h)
        return torch.stack(outputs)

    def _normalised(self, norm: Any, x: Tensor) -> Tensor:
        weight, bias = norm.weight, getattr(norm, "bias", None)
        if isinstance(norm, nk.LayerNorm):
            return F.layer_norm(x, x.shape[1:], weight, bias, norm.eps)
        if isinstance(norm, nk.RMSNorm):
            y = F.rms_norm(x, x.shape[1:], weight, norm.eps)
            return y if bias is None else y + bias
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=norm.eps)
