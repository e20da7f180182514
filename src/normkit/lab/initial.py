"""Initial weights: drawn in a fixed order from a generator of their own, so that all arms start from the same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_GAINED = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


def weights_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weight matrices and filters of linear, convolutional, recurrent and attention layers, in the model's order.

    These are what an arm's `init:` gain multiplies, and what must be equal across arms for a seed. Of a weight that
    something is computed from (spectral norm), it is the one that is learnt.
    """
    for path, module in model.named_modules():
        if isinstance(module, _GAINED):
            for name, parameter in _learnt(module):
                if parameter.ndim >= 2:
                    yield f"{path}.{name}" if path else name, parameter


def _learnt(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    if parametrize.is_parametrized(module):
        yield from ((name, made.original) for name, made in module.parametrizations.items())  # type: ignore[operator,union-attr]
    yield from module.named_parameters(recurse=False)


@torch.no_grad()
def glorot(model: nn.Module, generator: torch.Generator) -> None:
    """Gaussian weights of variance 2 / (fan_in + fan_out), biases 0: for sigmoid and tanh (Glorot & Bengio 2010)."""
    for _, weight in weights_of(model):
        nn.init.xavier_normal_(weight, generator=generator)
    _zero_biases(model)


@torch.no_grad()
def he(model: nn.Module, generator: torch.Generator) -> None:
    """Gaussian weights of variance 2 / fan_in, biases 0: for ReLU (He et al. 2015)."""
    for _, weight in weights_of(model):
        nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)
    _zero_biases(model)


@torch.no_grad()
def scale_weights_(model: nn.Module, gain: float) -> None:
    """Multiplies every weight of linear, convolutional, recurrent and attention layers by `gain`; biases stay."""
    for _, weight in weights_of(model):
        weight.mul_(gain)


def weights_fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits of all these weights: equal for two arms exactly when they start from the same ones."""
    digest = hashlib.sha256()
    for _, weight in weights_of(model):
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _zero_biases(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, _GAINED):
            for name, parameter in module.named_parameters(recurse=False):
                if "bias" in name:  # attention calls it in_proj_bias
                    nn.init.zeros_(parameter)
