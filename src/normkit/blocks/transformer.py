"""Transformer layers with any norm: torch's, with what batch norm needs there, and norms on queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normkit.blocks.attention import attend
from normkit.blocks.token_norms import NormName, over_tokens, token_norm

PLACEMENTS = ("pre", "post")


class _Block(nn.Module):
    """What both layers share: their norms, and how a branch is added."""

    norm_first: bool
    linear1: nn.Linear
    linear2: nn.Linear
    dropout: nn.Dropout
    activation: Callable[[Tensor], Tensor]
    ffn_norm: nn.Module | None

    def _set_norms(
        self,
        norm: NormName,
        placement: str | None,
        qk_norm: NormName,
        ffn_norm: NormName,
        eps: float,
        places: int,
        **options: Any,
    ) -> None:
        if placement not in (*PLACEMENTS, None):
            raise ValueError(f"{type(self).__name__}: placement={placement!r} is neither {' nor '.join(PLACEMENTS)}")
        if placement is not None:
            self.norm_first = placement == "pre"
        width, bias = self.linear1.in_features, self.linear1.bias is not None
        for place in range(1, places + 1):
            setattr(self, f"norm{place}", token_norm(norm, width, eps=eps, bias=bias, **options))
        self.ffn_norm = (
            None if ffn_norm is None else token_norm(ffn_norm, self.linear1.out_features, eps=eps, bias=bias, **options)
        )
        for name, layer in [*self.named_children()]:
            if isinstance(layer, nn.MultiheadAttention):
                made = {part: token_norm(qk_norm, layer.head_dim, **options) for part in ("query", "key")}
                setattr(self, f"{name}_norms", None if qk_norm is None else nn.ModuleDict(made))

    def _add(self, x: Tensor, branch: Callable[[Tensor], Tensor], norm: nn.Module, keep: Tensor | None) -> Tensor:
        if self.norm_first:
            return x + branch(over_tokens(norm, x, keep))
        return over_tokens(norm, x + branch(x), keep)

    def _feed(self, x: Tensor, keep: Tensor | None) -> Tensor:
        inner = self.linear1(x)
        if self.ffn_norm is not None:
            inner = over_tokens(self.ffn_norm, inner, keep)
        return self.linear2(self.dropout(self.activation(inner)))


def _kept(padding: Tensor | None, batch_first: bool) -> Tensor | None:
    """(n, t) of torch's layers, True (or not 0) for padding -> in the layout of the tokens, True for what counts."""
    if padding is None:
        return None
    keep = padding.logical_not()
    return keep if batch_first else keep.T


class TransformerEncoderLayer(_Block, nn.TransformerEncoderLayer):
    """Self-attention, then a network for each token, each added to what goes in: torch's layer with any norm.

    ``"pre"``: ``x = x + attention(norm1(x))``, ``x = x + network(norm2(x))``; ``"post"``: ``x = norm1(x +
    attention(x))``, ``x = norm2(x + network(x))``; ``network(x) = linear2(activation(ffn_norm(linear1(x))))``. With a
    causal mask it is the block of a language model.

    Args:
        d_model: features of a token, c.
        nhead: heads; they divide ``d_model``.
        dim_feedforward: features between the two linear layers.
        dropout: probability, on the weights of attention, inside the network and on both branches.
        activation: ``"relu"``, ``"gelu"`` or a function.
        layer_norm_eps: of every norm that has an eps, but those of queries and keys.
        batch_first: (n, t, c) instead of (t, n, c), in and out.
        norm_first: as ``placement="pre"``, in torch's words.
        bias: of linear layers and norms.
        device: of parameters and buffers.
        dtype: of the parameters.
        norm: a name as :func:`normkit.create` takes it: ``"layer"``, ``"rms"``, ``"batch"``, ``"power:4000"``, or
            ``"none"``; or ``"rep"`` (:class:`normkit.blocks.RepBatchNorm`) or ``"progressive:STEPS"``
            (:class:`normkit.blocks.ProgressiveRepBatchNorm`), or a function of the channels that makes a norm. Norms
            over samples take every token that is no padding for one sample.
        placement: ``"pre"`` or ``"post"``; ``None``: as ``norm_first`` says.
        qk_norm: a name, for a norm over the channels of each head, on queries and on keys: ``"layer"`` or ``"rms"``.
        ffn_norm: a name, for a norm between the first linear layer and the activation; with ``"batch"`` here and as
            ``norm``, batch norm trains where without it runs crash (Yao et al.).

    Shapes: input and output (t, n, c), (n, t, c) with ``batch_first``, or (t, c). ``forward(src, src_mask=None,
    src_key_padding_mask=None, is_causal=False)``: the masks are torch's: of bool, True where NOT to look, or added;
    ``is_causal`` needs no mask beside it.

    Raises:
        ValueError: an unknown norm or placement.

    >>> import torch, normkit as nk
    >>> block = nk.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm="batch", ffn_norm="batch", qk_norm="rms")
    >>> padding = torch.arange(10) >= torch.tensor([[10], [7]])
    >>> block(torch.randn(2, 10, 64), src_key_padding_mask=padding, is_causal=True).shape
    torch.Size([2, 10, 64])

    The keys of torch's layer are the same, and with ``norm="layer"`` its checkpoints load. ``nn.TransformerEncoder``
    takes this layer (with ``enable_nested_tensor=False``); torch's fast path in evaluation does not.

    When not to use it: batch norm with ``placement="post"``, or without ``ffn_norm``, or in a language model: its
    training statistics are those of all positions, the later ones too. Layer or RMS norm are what works by default.

    Source: Vaswani et al. 2017, arXiv:1706.03762; Xiong et al. 2020, arXiv:2002.04745 (pre-norm); Yao et al. 2021,
    ICCV workshops (``ffn_norm``); Dehghani et al. 2023, arXiv:2302.05442 (``qk_norm``).
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        norm: NormName = "layer",
        placement: str | None = None,
        qk_norm: NormName = None,
        ffn_norm: NormName = None,
    ) -> None:
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        sizes = (d_model, nhead, dim_feedforward, dropout)
        super().__init__(*sizes, activation, layer_norm_eps, batch_first, norm_first, bias, **where)
        self.activation_relu_or_gelu = 0  # so that nn.TransformerEncoder does not run torch's own kernel in our place
        self._set_norms(norm, placement, qk_norm, ffn_norm, layer_norm_eps, 2, **where)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """(t, n, c) -> (t, n, c): see the class."""
        attention: Any = self.self_attn
        norms: Any = self.self_attn_norms
        alone, batch_first = src.dim() == 2, attention.batch_first
        x = src.unsqueeze(0 if batch_first else 1) if alone else src
        padding = src_key_padding_mask[None] if alone and src_key_padding_mask is not None else src_key_padding_mask
        keep = _kept(padding, batch_first)
        seen: dict[str, Any] = {"mask": src_mask, "padding": padding, "causal": is_causal}
        mixed = lambda own: self.dropout1(attend(attention, own, None, norms=norms, **seen))
        x = self._add(x, mixed, self.norm1, keep)
        x = self._add(x, lambda own: self.dropout2(self._feed(own, keep)), self.norm2, keep)
        return x.squeeze(0 if batch_first else 1) if alone else x


class TransformerDecoderLayer(_Block, nn.TransformerDecoderLayer):
    """Self-attention, attention to a memory, then a network for each token: torch's layer with any norm.

    As :class:`TransformerEncoderLayer`, with ``x = x + attention(norm2(x), memory)`` (or ``norm2(x + attention(x,
    memory))``) in the middle, and ``norm3`` for the network; the memory is taken as it is.

    Args, errors and when not to use it: those of :class:`TransformerEncoderLayer`.

    Shapes: input and output (t, n, c), or (n, t, c) with ``batch_first``; memory (s, n, c) or (n, s, c). The arguments
    of ``forward`` are those of torch's layer.

    >>> import torch, normkit as nk
    >>> block = nk.TransformerDecoderLayer(64, 4, 128, batch_first=True, norm="rms", placement="pre")
    >>> block(torch.randn(2, 10, 64), torch.randn(2, 7, 64), tgt_is_causal=True).shape
    torch.Size([2, 10, 64])

    Source: Vaswani et al. 2017, arXiv:1706.03762.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        norm: NormName = "layer",
        placement: str | None = None,
        qk_norm: NormName = None,
        ffn_norm: NormName = None,
    ) -> None:
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        sizes = (d_model, nhead, dim_feedforward, dropout)
        super().__init__(*sizes, activation, layer_norm_eps, batch_first, norm_first, bias, **where)
        self._set_norms(norm, placement, qk_norm, ffn_norm, layer_norm_eps, 3, **where)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """(t, n, c) -> (t, n, c): see the class."""
        keep = _kept(tgt_key_padding_mask, self.self_attn.batch_first)
        own: dict[str, Any] = {"mask": tgt_mask, "padding": tgt_key_padding_mask, "causal": tgt_is_causal}
        other: dict[str, Any] = {"mask": memory_mask, "padding": memory_key_padding_mask, "causal": memory_is_causal}
        first: Any = (self.self_attn, self.self_attn_norms)
        second: Any = (self.multihead_attn, self.multihead_attn_norms)
        mixed = lambda x: self.dropout1(attend(first[0], x, None, norms=first[1], **own))
        asked = lambda x: self.dropout2(attend(second[0], x, memory, norms=second[1], **other))
        x = self._add(tgt, mixed, self.norm1, keep)
        x = self._add(x, asked, self.norm2, keep)
        return self._add(x, lambda x: self.dropout3(self._feed(x, keep)), self.norm3, keep)
