"""digits-deep: how deep a network can be and still train, with norms, with skips, and with what stands for them."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from normkit import Identity, blocks
from normkit.lab import initial
from normkit.lab.errors import LabError
from normkit.lab.experiment import MOMENTUM_RATES, Experiment
from normkit.lab.labelled import split
from normkit.lab.tasks.samples import digits, images

# The question is whether a network trains at all: 90 % is far from chance, and a shallow network is far above it. The
# target of digits-cnn, fixed before any comparison.
TARGET = 0.9
KINDS = ("dense", "convolutional")
ARMS = ("none", "batch", "layer", "none+residual:skipinit", "none+residual:fixup", "none+residual:normalizer-free")
EVERY = (*ARMS, "none+residual:none", "batch+residual:none", "none+residual:normalizer-free+clip:0.02")
"""The last ones only when named, so that the command takes minutes."""
QUICK = ("none", "batch", "none+residual:skipinit", "none+residual:normalizer-free")
SMALLEST = 4
Layer = Callable[..., nn.Module]


def digits_deep(data: str | None = None, depth: int = 20, width: int = 64, kind: str = "dense") -> Experiment:
    """`depth` hidden layers of `width` (an even number: 2 per block); with kind=convolutional, 3x3 convolutions."""
    if kind not in KINDS:
        raise LabError(f"digits-deep with kind {kind!r}; choose {' or '.join(KINDS)}")
    if depth < SMALLEST or depth % 2:
        raise LabError(f"digits-deep with depth {depth}: blocks have 2 layers; choose an even --depth from {SMALLEST}")
    convolutional = kind == "convolutional"
    source, validation = images(data, "digits-deep") if convolutional else digits(data)
    inputs = source.x.shape[1] if convolutional else source.features

    def model(norm_layer: Layer, dropout: float = 0.0, placement: str = "before", residual: str = "plain") -> nn.Module:
        build = Builder(norm_layer, width, convolutional, dropout, placement, residual, depth // 2)
        pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if convolutional else []
        return nn.Sequential(
            build.layer(inputs),
            *(build.block(place) for place in range(depth // 2)),
            *build.activated(),
            *pooled,
            nn.Linear(width, source.classes),
        )

    return Experiment(
        name="digits-deep",
        title=f"{depth}-layer {kind} network of width {width} on {source.name}",
        description=(
            f"{depth // 2} blocks of two {'3x3 convolutions' if convolutional else 'linear layers'} of width {width} "
            f"classify {source.name}; in front of each layer are the norm of the arm and a ReLU. A plain residual "
            "block adds its input to its output; residual:none does not; skipinit multiplies the branch by a learned "
            "number that starts at 0; fixup starts with zeros in the last layer of each branch and small weights "
            "before it; normalizer-free standardises the weights and divides by the deviation that the input is "
            "expected to have. He's initial weights. Gradient norms of all layers at the first step are on the page."
        ),
        model=model,
        data=lambda seed: split(source, seed, validation, layout="image" if convolutional else "flat"),
        target=TARGET,
        arms=ARMS,
        quick_arms=QUICK,
        optimizer="momentum",
        rates=MOMENTUM_RATES,
        steps=150,
        quick_steps=80,
        eval_every=10,
        batch_size=50,
        dim=2 if convolutional else 1,
        initial=initial.he,
    )


class Builder:
    """Blocks of one network."""

    def __init__(
        self,
        norm_layer: Layer,
        width: int,
        convolutional: bool,
        dropout: float,
        placement: str,
        residual: str,
        count: int,
    ) -> None:
        self.norm_layer, self.width, self.convolutional = norm_layer, width, convolutional
        self.dropout, self.placement, self.residual = dropout, placement, residual
        self.betas = list(blocks.expected_deviations([False] * count))
        if residual in ("fixup", "normalizer-free") and not isinstance(norm_layer(width), Identity):
            raise LabError(f"residual:{residual} stands in the place of norms; write none+residual:{residual}")

    def layer(self, inputs: int) -> nn.Module:
        """A linear layer or a convolution, of standardised weights in a normalizer-free network."""
        if self.residual == "normalizer-free":
            gamma = blocks.activation_gain("relu") if inputs == self.width else 1.0
            if self.convolutional:
                return blocks.ScaledWSConv2d(inputs, self.width, 3, padding=1, gamma=gamma)
            return blocks.ScaledWSLinear(inputs, self.width, gamma=gamma)
        return nn.Conv2d(inputs, self.width, 3, padding=1) if self.convolutional else nn.Linear(inputs, self.width)

    def activated(self) -> list[nn.Module]:
        """Norm, ReLU, dropout."""
        norm = self.norm_layer(self.width)
        order = [norm, nn.ReLU()] if self.placement == "before" else [nn.ReLU(), norm]
        return [*order, nn.Dropout(self.dropout)] if self.dropout else order

    def block(self, place: int) -> nn.Module:
        """Two layers, and what adds them to their input."""
        if self.residual == "fixup":
            activation = nn.Sequential(nn.ReLU(), nn.Dropout(self.dropout)) if self.dropout else nn.ReLU()
            return blocks.FixupResidual([self.layer(self.width), self.layer(self.width)], activation)
        branch = nn.Sequential(*self.activated(), self.layer(self.width), *self.activated(), self.layer(self.width))
        if self.residual == "normalizer-free":
            return blocks.NormalizerFreeResidual(branch, beta=self.betas[place])
        if self.residual == "skipinit":
            return blocks.SkipInit(branch)
        return branch if self.residual == "none" else Plain(branch)


class Plain(nn.Module):
    """x + branch(x)."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x):
        """The sum."""
        return x + self.branch(x)
