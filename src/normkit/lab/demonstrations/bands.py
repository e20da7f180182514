"""Features of pictures without training: bands whose sum is the picture, and random convolutions as another opinion."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OPPONENTS = torch.tensor([[3**-0.5] * 3, [2**-0.5, -(2**-0.5), 0.0], [6**-0.5, 6**-0.5, -2 * 6**-0.5]])
"""Light, red against green, both against blue: a rotation, so that its transpose takes it back."""
LEVELS = 6
"""The coarsest bands see 64 pixels."""


class Bands(nn.Module):
    """Pictures (n, 3, h, w) to bands (n, 57, h, w): opponent colours, each in undecimated Haar wavelets of six scales.

    Horizontal, vertical and diagonal detail of every scale, and what is left: the picture is their sum.
    """

    channels = 3 * (3 * LEVELS + 1)

    def forward(self, pictures: Tensor) -> Tensor:
        rest, bands = torch.einsum("oc,nchw->nohw", OPPONENTS, pictures), []
        for level in range(LEVELS):
            smooth, across = _halves(rest, 2**level, -1)
            (rest, down), (side, diagonal) = _halves(smooth, 2**level, -2), _halves(across, 2**level, -2)
            bands += [down, side, diagonal]
        return torch.cat([*bands, rest], 1)

    def picture(self, bands: Tensor) -> Tensor:
        """The way back: (n, 57, h, w) -> (n, 3, h, w)."""
        return torch.einsum("oc,nohw->nchw", OPPONENTS, bands.unflatten(1, (-1, 3)).sum(1))


def _halves(x: Tensor, step: int, axis: int) -> tuple[Tensor, Tensor]:
    """Mean of, and half the difference between, every place and the one `step` before it; both add up to x."""
    before = x.index_select(axis, (torch.arange(x.shape[axis]) - step).clamp(min=0))
    return (x + before) / 2, (x - before) / 2


class RandomConvolutions(nn.Module):
    """Three layers of 3x3 convolutions with fixed random weights, ReLU and pooling: a judge that took no part."""

    def __init__(self) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3) for a, b in pairwise((3, 16, 32, 64)))
        with torch.no_grad():
            for layer in self.layers:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=drawn)  # type: ignore[arg-type]
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.requires_grad_(False)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """The features of each layer."""
        seen = []
        for layer in self.layers:
            pictures = layer(pictures).relu()
            seen.append(pictures)
            pictures = F.avg_pool2d(pictures, 2)
        return seen


def moments(features: Tensor) -> Tensor:
    """Mean and deviation of every channel over space, (n, c, h, w) -> (n, 2c): what AdaIN takes for style."""
    var, mean = torch.var_mean(features, (2, 3), correction=0)
    return torch.cat([mean, var.sqrt()], 1)
