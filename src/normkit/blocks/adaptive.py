"""Adaptive norms: moments of another picture in the place of an input's own, and layer norm under a condition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normkit.blocks.modulation import Modulation, kept, scaled
from normkit.norm import widened
from normkit.norms.instance_norm import SPEC as INSTANCE
from normkit.norms.instance_norm import instance_norm
from normkit.norms.layer_norm import SPEC as LAYER
from normkit.norms.layer_norm import LayerNorm


class AdaptiveInstanceNorm(nn.Module):
    """Give every channel of each sample the mean and deviation of another sample's: style transfer without weights.

    ``y = deviation(style) * (x - mean(x)) / deviation(x) + mean(style)``, mean and ``deviation =
    sqrt(var + eps)`` (biased) over space.

    Args:
        eps: added to both variances.
        backend: see :func:`normkit.backend`.

    Shapes: input and output (n, c, s...); style (n, c, r...), of any size in space, or (1, c, r...) for all samples.
    ``forward(input, style, *, mask=None, lengths=None)``: which values of the input count.

    Raises:
        ValueError: a style of other samples or channels; one value per channel.

    >>> import torch, normkit as nk
    >>> content, style = torch.randn(2, 3, 8, 8), 5 + 2 * torch.randn(2, 3, 6, 6)
    >>> y = nk.AdaptiveInstanceNorm()(content, style)
    >>> bool(torch.allclose(y.mean((2, 3)), style.mean((2, 3)), atol=1e-5))
    True

    When not to use it: where a learned style code is at hand (:class:`normkit.ConditionalInstanceNorm2d`); where style
    is more than two moments per channel, such as how channels vary together.

    Source: Huang & Belongie 2017, arXiv:1703.06868.
    """

    def __init__(self, eps: float = 1e-5, *, backend: str | None = None) -> None:
        super().__init__()
        self.eps, self.backend = eps, backend

    def forward(
        self, input: Tensor, style: Tensor, *, mask: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """(n, c, s...) and (n or 1, c, r...) -> (n, c, s...)."""
        if style.dim() < 3 or style.shape[1] != input.shape[1] or len(style) not in (1, len(input)):
            raise ValueError(
                f"AdaptiveInstanceNorm: the input is {tuple(input.shape)}, the style {tuple(style.shape)}.\n"
                "  give as many samples (or one) and channels in the style, and any number of places"
            )
        keep = kept("AdaptiveInstanceNorm", INSTANCE.over or "", input, mask, lengths)
        y = instance_norm(input, eps=self.eps, mask=keep, backend=self.backend)
        (wide,) = widened(style.flatten(2))
        var, mean = torch.var_mean(wide, -1, correction=0)
        as_channels = lambda t: t.view(*t.shape, *[1] * (input.dim() - 2))
        return scaled(y, as_channels((var + self.eps).sqrt()), as_channels(mean), keep)

    def extra_repr(self) -> str:
        """The options."""
        return f"eps={self.eps}" + ("" if self.backend is None else f", backend={self.backend!r}")


class AdaptiveLayerNorm(nn.Module):
    """Layer norm whose scale, shift and gate are one linear map of a condition, 0 at the start (adaLN-Zero).

    ``y = (1 + scale(z)) * (x - mean) / sqrt(var + eps) + shift(z)``; with ``gate``, ``gate(z)`` is returned beside it,
    for ``x + gate * branch(y)``: 0 at the start, so that every residual branch begins closed.

    Args:
        num_features: features of a token, c.
        condition_features: features of a condition, d. What acts on it before (DiT: SiLU) is the caller's.
        gate: return the gate too.
        eps: added to the variance.
        backend: see :func:`normkit.backend`.
        device: of the parameters.
        dtype: of the parameters.

    Shapes: input and output (n, t..., c); condition (n, d) for all tokens of a sample, or (n, t..., d) for each; gate
    (n, 1..., c), or (n, t..., c). ``forward(input, condition, *, mask=None, lengths=None)``: of tokens, (n, t...).

    Raises:
        ValueError: a condition that does not fit the samples.

    >>> import torch, normkit as nk
    >>> norm, branch = nk.AdaptiveLayerNorm(64, condition_features=16), torch.nn.Linear(64, 64)
    >>> x, time = torch.randn(2, 10, 64), torch.randn(2, 16)
    >>> y, gate = norm(x, time)
    >>> bool((x + gate * branch(y)).equal(x))
    True

    When not to use it: where the condition is a few classes and the input images
    (:class:`normkit.ConditionalBatchNorm2d`); beside a branch whose last layer starts at 0
    too: then nothing there gets a gradient.

    Source: Peebles & Xie 2023, arXiv:2212.09748; without a gate Perez et al. 2018, arXiv:1709.07871 (FiLM).
    """

    def __init__(
        self,
        num_features: int,
        condition_features: int,
        *,
        gate: bool = True,
        eps: float = 1e-5,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = LayerNorm(num_features, eps, elementwise_affine=False, backend=backend, **where)
        self.gate = gate
        parts = 3 if gate else 2
        self.modulation = Modulation("AdaptiveLayerNorm", num_features, None, condition_features, parts, **where)

    def forward(
        self,
        input: Tensor,
        condition: Tensor,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(n, t..., c) and (n, d) -> (n, t..., c), and the gate where there is one."""
        keep = kept("AdaptiveLayerNorm", LAYER.over or "", input, mask, lengths)
        y = self.norm(input) if keep is None else self.norm(input, mask=keep)
        parts = [_over_tokens(part, y) for part in self.modulation(condition, len(input))]
        y = scaled(y, 1 + parts[0], parts[1], keep)
        return (y, parts[2].to(y.dtype)) if self.gate else y


def _over_tokens(part: Tensor, y: Tensor) -> Tensor:
    """(n, c) as it broadcasts against (n, t..., c)."""
    return part.view(len(part), *[1] * (y.dim() - part.dim()), *part.shape[1:])
