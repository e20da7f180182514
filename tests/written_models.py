"""Models as people write them: the shapes of code in which norms meet additions and activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """The residual block of every ResNet: one ReLU object used twice, an addition in place."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        changes = stride != 1 or channels != out
        shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.downsample = shortcut if changes else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1; the addition out of place."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.expand = nn.Conv2d(width, channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.reduce(x)), inplace=True)
        y = F.leaky_relu(self.norm2(self.conv(y)), 0.2)
        return torch.relu(x + self.norm3(self.expand(y)))


class ConvNorm(nn.Sequential):
    """A chain under a name of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))


class InvertedResidual(nn.Module):
    """The norm is in a child, the addition outside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(ConvNorm(channels), nn.ReLU6(inplace=True), ConvNorm(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class PreActivation(nn.Module):
    """Norm and activation before the convolution; the activated value is read twice."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        before = F.relu(self.norm1(x))
        y = self.conv1(before)
        y = self.conv2(F.relu(self.norm2(y)))
        y += self.shortcut(before)
        return y


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.layer1 = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 16, stride=2))
        self.layer2 = nn.Sequential(Bottleneck(16, 8), PreActivation(16), InvertedResidual(16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.stem(x)))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class UNetBlock(nn.Module):
    """Group norm and SiLU, and an embedding that not every call gives."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(4, channels)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.embed = nn.Linear(6, out)
        self.norm2 = nn.GroupNorm(4, out)
        self.act = nn.SiLU()
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.conv1(self.act(self.norm1(x)))
        if emb is not None:
            h = h + self.embed(emb)[:, :, None, None]
        h = self.conv2(self.act(self.norm2(h)))
        return self.skip(x) + h


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.ModuleList([UNetBlock(8, 8), UNetBlock(8, 16)])
        self.up = nn.ModuleList([UNetBlock(24, 16), UNetBlock(24, 8)])
        self.last = nn.Sequential(nn.InstanceNorm2d(8, affine=True), nn.LeakyReLU(0.1), nn.Conv2d(8, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x)
        emb = x.mean((2, 3))[:, :6]
        skips = []
        for block in self.down:
            skips.append(x)
            x = block(x, emb)
        for block in self.up:
            x = block(torch.cat([x, skips.pop()], 1), emb)
        return self.last(x)


class TransformerBlock(nn.Module):
    """RMS norm before the attention, layer norm after the projection with its addition (as in Swin V2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before = nn.RMSNorm(width)
        self.mix = nn.Linear(width, width)
        self.after = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.middle = nn.LayerNorm(2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        h = self.before(x)
        scores = (h @ h.transpose(-1, -2) * scale).softmax(-1)
        x = x + self.after(self.mix(scores @ h))
        return x + self.down(F.gelu(self.middle(self.up(x)), approximate="tanh"))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([TransformerBlock(12) for _ in range(2)])
        self.norm = nn.RMSNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Sequence(nn.Module):
    """A convolution over time and fully connected layers, with 1-d batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(3, 7, 3), nn.BatchNorm1d(7))
        self.head = nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9, affine=False), nn.GELU(), nn.Linear(9, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        y += x[:, :1, 2:].repeat(1, 7, 1)
        return self.head(torch.relu_(y).mean(-1))


def images(*, channels_last: bool = False) -> Tensor:
    """Off-centre and off-scale per channel, with one outlier."""
    x = torch.randn(5, 3, 12, 10) * torch.tensor([0.3, 4.0, 30.0]).view(3, 1, 1) + torch.tensor([5.0, -2.0, 70.0]).view(
        3, 1, 1
    )
    x[0, 0, 0, 0] = 50.0
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def tokens() -> Tensor:
    x = torch.randn(3, 7, 12) * 3 + 2
    x[1, 2, 3] = -40.0
    return x


def signals() -> Tensor:
    return torch.randn(6, 3, 11) * 5 - 7


MODELS = {
    "resnet": (ResNet, images, 11),
    "resnet channels-last": (ResNet, lambda: images(channels_last=True), 11),
    "unet": (UNet, images, 9),
    "transformer": (Transformer, tokens, 4),
    "sequence": (Sequence, signals, 2),
}
"""Name -> how to make the model, its input, and how many of its norms take something in."""


def make(name: str, *, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A model with affine parameters and running statistics that are not those of a fresh one, and an input."""
    torch.manual_seed(seed)
    build, data, _ = MODELS[name]
    model, x = build(), data()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm):
                for parameter in module.parameters(recurse=False):
                    parameter.copy_(torch.rand_like(parameter) + 0.3)
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(1.0, 2.0)
                module.running_var.uniform_(0.5, 4.0)
    return model, x
