"""The multilayer perceptron of the tasks digits, digits-relu and tabular."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import nn


def perceptron(
    norm_layer: Callable[[int], nn.Module],
    sizes: list[int],
    activation: Callable[[], nn.Module],
    dropout: float,
    placement: str,
) -> nn.Sequential:
    """Linear, norm, activation, dropout for every hidden layer of `sizes`, then a linear layer; biases everywhere.

    A bias in front of batch norm is idle, but with it the networks of all arms differ in the norm and in nothing else.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes[:-1]):
        norm = norm_layer(outputs)
        layers.append(nn.Linear(inputs, outputs))
        layers += [norm, activation()] if placement == "before" else [activation(), norm]
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))
