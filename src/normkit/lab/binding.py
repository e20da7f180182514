"""Norms that take no mean away, bound to the layer whose output they get: moving averages in any network of a task."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from normkit.lab.errors import LabError
from normkit.lab.norm_layer import norms_of
from normkit.statistics import MovingAverage, bind


def bind_norms(model: nn.Module, arm: str) -> None:
    """Binds each moving-average norm of an arm to the layer right before it in the same `nn.Sequential`.

    A bias of that layer, idle in front of a norm that takes the mean away, would be one here: it is held at 0, as the
    paper's layers have none. LabError where a norm follows something else, so that nothing can be centred for it.
    """
    chains = [module for module in model.modules() if isinstance(module, nn.Sequential)]
    before = {id(after): layer for chain in chains for layer, after in pairwise(chain)}
    for name, norm in norms_of(model).items():
        if not isinstance(getattr(norm, "statistics", None), MovingAverage):
            continue
        layer = before.get(id(norm))
        try:
            bind(norm, layer)  # type: ignore[arg-type]  # None is refused as any other module is
        except TypeError:
            found = "nothing" if layer is None else type(layer).__name__
            raise LabError(
                f"arm {arm!r} centres the weights of the layer before each norm, and before {name!r} there is {found}; "
                "it needs a linear or convolutional layer right before the norm in the same nn.Sequential"
            ) from None
        if layer.bias is not None:  # type: ignore[union-attr]
            nn.init.zeros_(layer.bias).requires_grad_(False)  # type: ignore[union-attr, arg-type]
