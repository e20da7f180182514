"""Layers with centred weights, which stand before a norm that takes no mean away (weight centralisation)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Centred:
    """The weights of every output channel less their mean; stored as they are, so that checkpoints fit both ways."""

    weight: Any  # torch's classes declare it in their own ways

    def centred(self) -> Tensor:
        """``weight - mean(weight)`` over everything but the output channels; the gradient passes through both."""
        return self.weight - self.weight.mean(tuple(range(1, self.weight.dim())), keepdim=True)


class _CentredConvolution(Centred):
    def forward(self, input: Tensor) -> Tensor:
        """(n, in, s...) -> (n, out, s...)."""
        conv: Any = self
        return conv._conv_forward(input, self.centred(), conv.bias)


class CentredLinear(Centred, nn.Linear):
    """torch's, with centred weights."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(input, self.centred(), self.bias)


class CentredConv1d(_CentredConvolution, nn.Conv1d):
    """torch's, with centred weights."""


class CentredConv2d(_CentredConvolution, nn.Conv2d):
    """torch's, with centred weights."""


class CentredConv3d(_CentredConvolution, nn.Conv3d):
    """torch's, with centred weights."""


CENTRED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: CentredLinear,
    nn.Conv1d: CentredConv1d,
    nn.Conv2d: CentredConv2d,
    nn.Conv3d: CentredConv3d,
}


def centred_weights(model: nn.Module) -> dict[str, Tensor]:
    """By their key in the ``state_dict``: what a plain layer needs, to compute the same."""
    with torch.no_grad():
        return {
            f"{name}.weight" if name else "weight": module.centred()
            for name, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, Centred)
        }
