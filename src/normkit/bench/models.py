"""Whole models, written the way people write them: torch's norms, in-place activations, in-place additions.

Nothing in them knows normkit. They are what ``nk.accelerate_`` and the compiler backend are given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normkit.bench.cases import LAYOUTS


@dataclass(frozen=True)
class Setting:
    """A model with a batch to train it on."""

    make: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    told: str
    layouts: tuple[str, ...] = LAYOUTS[:1]
    """That weights and inputs are laid out in."""


class Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            if stride > 1 or channels != out
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += self.shortcut(x)
        return self.relu(y)


class ResNet(nn.Module):
    """He et al. 2015, arXiv:1512.03385, with the stride on the 3x3 convolution."""

    def __init__(self, blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        stages, channels = [], width
        for index, count in enumerate(blocks):
            for block in range(count):
                inner = width * 2**index
                stages.append(Bottleneck(channels, inner, 2 if index and not block else 1))
                channels = 4 * inner
        self.stages, self.head = nn.Sequential(*stages), nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stages(self.pool(self.relu(self.bn(self.conv(x)))))
        return self.head(y.mean((2, 3)))


class Residual(nn.Module):
    """norm, SiLU, convolution, twice, plus the input: the block of diffusion U-Nets (Ho et al., arXiv:2006.11239)."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, channels), nn.Conv2d(channels, out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(32, out), nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        y += self.shortcut(x)
        return y


class UNet(nn.Module):
    """Two levels down, two up, with concatenated skips."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.down1, self.down2 = Residual(width, width), Residual(width, 2 * width)
        self.middle = Residual(2 * width, 4 * width)
        self.up2, self.up1 = Residual(6 * width, 2 * width), Residual(3 * width, width)
        self.norm, self.last = nn.GroupNorm(32, width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(self.first(x))
        two = self.down2(F.avg_pool2d(one, 2))
        y = self.middle(F.avg_pool2d(two, 2))
        y = self.up2(torch.cat([F.interpolate(y, scale_factor=2.0), two], 1))
        y = self.up1(torch.cat([F.interpolate(y, scale_factor=2.0), one], 1))
        return self.last(F.silu(self.norm(y)))


class Layer(nn.Module):
    """Attention and a gated MLP, each behind an RMS norm (Touvron et al. 2023, arXiv:2302.13971; no positions)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, 3 * width, bias=False)
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).movedim(2, 0).transpose(2, 3)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Transformer(nn.Module):
    """A small language model over bytes."""

    def __init__(self, layers: int = 4, width: int = 256, heads: int = 4, symbols: int = 256) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.RMSNorm(width, eps=1e-6), nn.Linear(width, symbols, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.embed(tokens))))


def _images(batch: int, side: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.empty(batch, 3, side, side).normal_(0.4, 0.8, generator=generator)
    return x, torch.randint(classes, (batch,), generator=generator)


def _noise(batch: int, side: int) -> tuple[Tensor, Tensor]:
    return _images(batch, side, 2)[0], torch.empty(batch, 3, side, side).normal_()


def _bytes(batch: int, length: int) -> tuple[Tensor, Tensor]:
    text = torch.randint(256, (batch, length + 1), generator=torch.Generator().manual_seed(0))
    return text[:, :-1], text[:, 1:]


def _per_symbol(scores: Tensor, symbols: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), symbols.flatten())


MODELS: dict[str, Setting] = {
    "resnet50": Setting(ResNet, lambda: _images(8, 224, 1000), F.cross_entropy, "ResNet-50, batch 8, 224x224", LAYOUTS),
    "unet": Setting(UNet, lambda: _noise(4, 64), F.mse_loss, "U-Net, group norm + SiLU, batch 4, 64x64", LAYOUTS),
    "transformer": Setting(Transformer, lambda: _bytes(8, 256), _per_symbol, "Transformer, RMS norm, 8 x 256 bytes"),
}
"""A training step of each is timed: forward, loss, backward, optimizer."""
