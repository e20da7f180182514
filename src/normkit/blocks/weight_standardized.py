"""Layers whose weights are standardised before each use: of mean 0 and one deviation, whatever training makes of them.

They are no norms of activations, so no pattern and no law of ``norms/`` speaks of them: they are blocks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def standardized(weight: Tensor, gain: Tensor | float, *, scale: float, eps: float, floor: bool) -> Tensor:
    """``gain * (weight - mean) / deviation`` for each output unit, over all else; in float32 or better.

    ``scale`` multiplies the variance first. ``floor``: epsilon is a floor of the variance, otherwise it is added.
    """
    rows = weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
    centred = rows - rows.mean(1, keepdim=True)
    variance = centred.square().mean(1, keepdim=True) * scale
    rstd = (variance.clamp(min=eps) if floor else variance + eps).rsqrt()
    factor = rstd * gain.to(rows.dtype).view(-1, 1) if isinstance(gain, Tensor) else rstd * gain
    return (centred * factor).view(weight.shape).to(weight.dtype)


class _WeightStandardized(nn.Module):
    """Mixin before a convolution of torch."""

    weight: Any
    bias: Any
    eps: float

    def __init__(self, *args: Any, eps: float = 1e-5, **options: Any) -> None:
        super().__init__(*args, **options)
        self.eps = eps

    def standardized_weight(self) -> Tensor:
        """What the layer multiplies with."""
        return standardized(self.weight, 1.0, scale=1.0, eps=self.eps, floor=False)

    def forward(self, input: Tensor) -> Tensor:
        """As torch's layer, with the standardised weight."""
        return self._conv_forward(input, self.standardized_weight(), self.bias)  # type: ignore[operator]

    def extra_repr(self) -> str:
        """torch's text, and epsilon."""
        return f"{super().extra_repr()}, eps={self.eps}"


class _ScaledWeightStandardized(_WeightStandardized):
    """Mixin before a convolution or a linear layer of torch, with a learned gain per output unit."""

    def __init__(self, *args: Any, gamma: float = 1.0, eps: float = 1e-4, **options: Any) -> None:
        super().__init__(*args, eps=eps, **options)
        self.gamma = gamma
        weight = self.weight
        self.gain = nn.Parameter(torch.ones(weight.shape[0], device=weight.device, dtype=weight.dtype))

    def standardized_weight(self) -> Tensor:
        """What the layer multiplies with."""
        fan_in = self.weight[0].numel()
        return standardized(self.weight, self.gain * self.gamma, scale=fan_in, eps=self.eps, floor=True)

    def extra_repr(self) -> str:
        """torch's text, epsilon and the fixed gain."""
        return f"{super().extra_repr()}, gamma={self.gamma:.5g}"


class WSConv2d(_WeightStandardized, nn.Conv2d):
    """A convolution with standardised weights; a drop-in for ``torch.nn.Conv2d``, with its arguments and checkpoints.

    ``y = conv(x, (weight - mean) / sqrt(var + eps)) + bias`` with mean and (biased) variance of the weights of each
    output channel, over input channels and kernel.

    Args:
        args: as in torch.
        eps: added to the variance.
        options: as in torch.

    Shapes: as in torch.

    >>> import torch, normkit as nk
    >>> conv = nk.WSConv2d(3, 8, 3)
    >>> bool(conv.standardized_weight().mean((1, 2, 3)).abs().max() < 1e-6), conv(torch.randn(2, 3, 5, 5)).shape
    (True, torch.Size([2, 8, 3, 3]))

    When not to use it: without a norm behind it. The output is larger than the input by the root of the number of
    weights per channel; :class:`ScaledWSConv2d` is the one that keeps the scale. It goes with group norm.

    Source: Qiao, Wang, Liu, Shen & Yuille 2019, arXiv:1903.10520.
    """


class WSConv1d(_WeightStandardized, nn.Conv1d):
    """A convolution with standardised weights, of (n, c, l): see :class:`WSConv2d`."""


class WSConv3d(_WeightStandardized, nn.Conv3d):
    """A convolution with standardised weights, of (n, c, d, h, w): see :class:`WSConv2d`."""


class ScaledWSConv2d(_ScaledWeightStandardized, nn.Conv2d):
    """A convolution that keeps the variance of its input, by standardised weights; a drop-in for ``torch.nn.Conv2d``.

    ``y = conv(x, gain * gamma * (weight - mean) / sqrt(max(var * fan_in, eps))) + bias``, with mean and (biased)
    variance of the weights of each output channel, and ``fan_in`` of them.

    Args:
        args: as in torch.
        gamma: what undoes the activation in front: :func:`normkit.blocks.activation_gain`.
        eps: the least variance times fan-in.
        options: as in torch.

    Shapes: as in torch. Learns ``gain``, (output channels,), besides what torch's layer learns; it starts at 1.

    >>> import torch, normkit as nk
    >>> conv = nk.ScaledWSConv2d(64, 64, 3, gamma=nk.blocks.activation_gain("relu"))
    >>> y = conv(torch.randn(8, 64, 16, 16).relu())
    >>> bool(0.9 < y.var() < 1.1)
    True

    When not to use it: next to a norm, which makes the scale irrelevant; for depthwise convolutions of few weights per
    channel, where a mean of 0 takes much of them away.

    Source: Brock, De & Smith 2021, arXiv:2101.08692.
    """


class ScaledWSConv1d(_ScaledWeightStandardized, nn.Conv1d):
    """A convolution that keeps the variance of its input, of (n, c, l): see :class:`ScaledWSConv2d`."""


class ScaledWSConv3d(_ScaledWeightStandardized, nn.Conv3d):
    """A convolution that keeps the variance of its input, of (n, c, d, h, w): see :class:`ScaledWSConv2d`."""


class ScaledWSLinear(_ScaledWeightStandardized, nn.Linear):
    """A linear layer that keeps the variance of its input: see :class:`ScaledWSConv2d`."""

    def forward(self, input: Tensor) -> Tensor:
        """As torch's layer, with the standardised weight."""
        return F.linear(input, self.standardized_weight(), self.bias)
