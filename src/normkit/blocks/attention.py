"""Attention over several heads with the parameters of torch's MultiheadAttention, and norms on queries and keys."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normkit.blocks.token_norms import over_tokens


def attend(
    layer: nn.MultiheadAttention,
    x: Tensor,
    memory: Tensor | None,
    *,
    mask: Tensor | None,
    padding: Tensor | None,
    causal: bool,
    norms: nn.ModuleDict | None,
) -> Tensor:
    """``softmax(norm(q) norm(k)ᵀ / sqrt(d) + mask) v`` by head, then the output layer.

    Args:
        layer: holds the parameters, the dropout, and which axis is the samples'.
        x: what asks: (n, t, c), or (t, n, c).
        memory: what answers, (n, s, c) or (s, n, c); ``None``: x.
        mask: (t, s), (n * heads, t, s): of bool, True where a query must NOT look (torch's layers say it so), or added.
        padding: (n, s), the same for keys of a sample.
        causal: no query looks at later keys; then ``mask`` is taken for the same statement and may be left out.
        norms: of ``query`` and ``key``, over the channels of a head.

    Returns:
        Of the shape of x.
    """
    heads, width = layer.num_heads, layer.embed_dim
    weight, bias = layer.in_proj_weight, layer.in_proj_bias
    samples_last = (1, 2, 0, 3) if layer.batch_first is False else (0, 2, 1, 3)

    def by_head(t: Tensor) -> Tensor:  # -> (n, heads, t, c / heads)
        return t.unflatten(-1, (heads, -1)).permute(samples_last)

    if memory is None:
        query, key, value = map(by_head, F.linear(x, weight, bias).chunk(3, -1))
    else:
        first, rest = (None, None) if bias is None else bias.split((width, 2 * width))
        query = by_head(F.linear(x, weight[:width], first))
        key, value = map(by_head, F.linear(memory, weight[width:], rest).chunk(2, -1))
    if norms is not None:
        query, key = over_tokens(norms["query"], query), over_tokens(norms["key"], key)
        query, key = query.to(value.dtype), key.to(value.dtype)  # autocast has norms in float32
    if padding is None and causal:
        mask = None
    else:
        mask = _allowed(mask, padding, causal, query, key)
        causal = False
    dropout = layer.dropout if layer.training else 0.0
    mixed = F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal=causal)
    joined = mixed.permute(0, 2, 1, 3) if layer.batch_first else mixed.permute(2, 0, 1, 3)
    return layer.out_proj(joined.flatten(2))


def _allowed(mask: Tensor | None, padding: Tensor | None, causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
    """What scaled_dot_product_attention wants: of bool, True where a query may look, or what is added."""
    if causal and mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).triu(1)
    if mask is not None and mask.dim() == 3:
        mask = mask.unflatten(0, query.shape[:2])
    if padding is not None:
        padding = padding[:, None, None]
    given: list[Any] = [t for t in (mask, padding) if t is not None]
    if not given:
        return None
    if all(t.dtype == torch.bool for t in given):
        both = given[0] if len(given) == 1 else given[0] | given[1]
        return ~both
    added = [
        t if t.dtype != torch.bool else torch.zeros_like(t, dtype=query.dtype).masked_fill(t, -torch.inf) for t in given
    ]
    return sum(added[1:], added[0]).to(query.dtype)
