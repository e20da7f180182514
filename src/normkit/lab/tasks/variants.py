"""variants: every norm in one residual convolutional network, at small and large batches: `--sweep batch-size=4,64`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from normkit.lab import initial
from normkit.lab.experiment import MOMENTUM_RATES, Experiment
from normkit.lab.labelled import split
from normkit.lab.tasks.samples import images

TARGET = 0.9  # that of digits-cnn, whose blocks these are but for the order inside
ARMS = ("none", "batch", "layer", "group:4", "instance", "switchable", "frn:tlu", "evonorm_s0:4", "dyt")
EVERY = (*ARMS, "rms", "power:20", "evonorm_b0", "grn", "derf")
"""All that the catalogue has for it; the last ones only when named, so that the command takes minutes."""
QUICK = ("none", "batch", "layer", "group:4", "instance", "evonorm_s0:4")


class Block(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))): every norm has an activation behind it, or brings its own (EvoNorm)."""

    def __init__(self, norm_layer: Callable[[int], nn.Module], width: int, dropout: float, placement: str) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *activated(norm_layer(width), placement),
            _convolution(width, width),
            *activated(norm_layer(width), placement),
            *([nn.Dropout(dropout)] if dropout else []),
            _convolution(width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The sum."""
        return x + self.branch(x)


def variants(data: str | None = None, depth: int = 6, width: int = 12) -> Experiment:
    """`depth` weighted layers (an even number: 2 per block, one before and one after), pre-activation."""
    source, validation = images(data, "variants")

    def model(norm_layer: Callable[[int], nn.Module], dropout: float = 0.0, placement: str = "before") -> nn.Module:
        return nn.Sequential(
            _convolution(source.x.shape[1], width),
            *(Block(norm_layer, width, dropout, placement) for _ in range(max(1, depth // 2 - 1))),
            *activated(norm_layer(width), placement),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, source.classes),
        )

    return Experiment(
        name="variants",
        title=f"every norm in a {depth}-layer residual convolutional network on {source.name}",
        description=(
            f"{max(1, depth // 2 - 1)} pre-activation blocks of two 3x3 convolutions with {width} channels. Norms that "
            "are an activation as well (EvoNorm, filter response norm with its threshold) have no ReLU behind them. "
            "PowerNorm warms up for 20 batches. Global response norm is made to stand beside another norm and stands "
            "alone here."
        ),
        model=model,
        data=lambda seed: split(source, seed, validation, layout="image"),
        target=TARGET,
        arms=ARMS,
        quick_arms=QUICK,
        optimizer="momentum",
        rates=MOMENTUM_RATES,
        steps=150,
        quick_steps=50,
        eval_every=10,
        batch_size=32,
        dim=2,
        initial=initial.he,
        probed=64,
    )


def activated(norm: nn.Module, placement: str) -> list[nn.Module]:
    """The norm and a ReLU, in either order; the norm alone where it is an activation as well."""
    if getattr(norm, "activates", False) or getattr(norm, "activation", None) is not None:
        return [norm]
    return [norm, nn.ReLU()] if placement == "before" else [nn.ReLU(), norm]


def _convolution(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)
