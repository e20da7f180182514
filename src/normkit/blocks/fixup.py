"""Fixup: residual learning without normalization by initial values alone, and a few learned numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class FixupResidual(nn.Module):
    """``y = shortcut(x) + scale * branch(x) + bias``: a branch with a bias before each layer and activation.

    The branch is ``layer(activation(layer(x + bias) + bias) + bias)`` and so on: one learned number in front of each
    layer and each activation, which starts at 0, and one learned ``scale`` that starts at 1.

    Args:
        layers: linear layers or convolutions, at least two; they need no bias of their own.
        activation: between them; one module for all.
        shortcut: a module for where shapes change; ``None``: x itself.

    Shapes: those of the layers; the last output has the shape of the shortcut's.

    Raises:
        ValueError: fewer than two layers, for which the formula has no power.

    >>> import torch, normkit as nk
    >>> linear = torch.nn.Linear
    >>> model = torch.nn.Sequential(*(nk.blocks.FixupResidual([linear(8, 8), linear(8, 8)]) for _ in range(9)))
    >>> x = torch.randn(4, 8)
    >>> nk.blocks.fixup_(model)(x).equal(x)
    True

    When not to use it: where a start at the identity is not wanted; with norms in the branch.

    Source: Zhang, Dauphin & Ma 2019, arXiv:1901.09321.
    """

    def __init__(
        self, layers: Sequence[nn.Module], activation: nn.Module | None = None, shortcut: nn.Module | None = None
    ) -> None:
        super().__init__()
        if len(layers) < 2:
            raise ValueError(f"FixupResidual: {len(layers)} layers; the initial scale needs at least 2 in a branch")
        self.layers = nn.ModuleList(layers)
        self.activation = nn.ReLU() if activation is None else activation
        self.shortcut = shortcut
        self.biases = nn.Parameter(torch.zeros(2 * len(layers)))
        """In front of each layer, behind each layer."""
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, input: Tensor) -> Tensor:
        """The sum."""
        x, last = input, len(self.layers) - 1
        for place, layer in enumerate(self.layers):
            x = layer(x + self.biases[2 * place])
            if place < last:
                x = self.activation(x + self.biases[2 * place + 1])
        kept = input if self.shortcut is None else self.shortcut(input)
        return kept + self.scale * x + self.biases[-1]


@torch.no_grad()
def fixup_(
    model: nn.Module,
    head: nn.Module | None = None,
    generator: torch.Generator | None = None,
    *,
    draw: bool = True,
) -> nn.Module:
    """Give every :class:`FixupResidual` in the model its initial weights, and the head zeros; the model comes back.

    Each layer of a branch gets He's normal weights times ``L ** (-1 / (2 m - 2))``, for L branches in the model and m
    layers in the branch; the last layer of each branch, and ``head``, get zeros.

    Args:
        model: with its branches.
        head: the classifier.
        generator: of random numbers.
        draw: draw He's weights; otherwise scale those there are.

    Raises:
        ValueError: a model without a :class:`FixupResidual`.

    Source: Zhang, Dauphin & Ma 2019, arXiv:1901.09321.
    """
    branches = [module for module in model.modules() if isinstance(module, FixupResidual)]
    if not branches:
        raise ValueError(f"fixup_: {type(model).__name__} has no FixupResidual; build its blocks of these first")
    for branch in branches:
        layers: list[Any] = [*branch.layers]
        *earlier, last = layers
        for layer in earlier:
            if draw:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            layer.weight.mul_(len(branches) ** (-1 / (2 * len(layers) - 2)))
        nn.init.zeros_(last.weight)
        for layer in layers:
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    if head is not None:
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
    return model
