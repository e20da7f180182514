"""Feeding: which layers hand their output straight to a norm that takes the scale of their weight away."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn

from normkit.measure.observer import Seen
from normkit.measure.sites import norm_site
from normkit.statistics.batch import PLAIN, Batch
from normkit.statistics.ghost import Ghost
from normkit.statistics.synchronized import Synchronized


class Feeding:
    """Listens to one forward pass: the object that a layer returns is the one that a norm is given."""

    def __init__(self) -> None:
        self.before_norms: dict[str, str] = {}
        """By name of the weight, the norm behind it."""
        self._made: list[tuple[weakref.ref, str, nn.Module]] = []

    def listen(self, name: str, module: nn.Module) -> list[Any]:
        """Handles of what was hung on the module, if anything."""
        if norm_site(module) is not None:
            return [module.register_forward_pre_hook(self._taken(name), with_kwargs=True)]
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() < 2 or isinstance(module, nn.Embedding):
            return []
        return [module.register_forward_hook(self._given(f"{name}.weight" if name else "weight"))]

    def _given(self, weight: str) -> Any:
        def note(module: nn.Module, args: tuple, output: Any) -> None:
            if isinstance(output, Tensor):
                self._made.append((weakref.ref(output), weight, module))

        return note

    def _taken(self, norm: str) -> Any:
        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            x = Seen(module, args, kwargs).input
            for made, weight, layer in self._made:
                if x is not None and made() is x and takes_scale_away(module, layer):
                    self.before_norms[weight] = norm

        return note


def takes_scale_away(norm: Any, layer: Any) -> bool:
    """Whether ``norm(c * weight ...)`` is the same for every c > 0, but for eps."""
    site = norm_site(norm)
    if site is None:
        return False
    if site.across_samples:  # which takes away a bias as well
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm):  # power norm goes by what it remembers, in part
            return False
        given = norm.running_mean is not None and not norm.training
        policy = getattr(norm, "statistics", PLAIN)
        return not given and not getattr(norm, "frozen", False) and isinstance(policy, Batch | Ghost | Synchronized)
    return getattr(layer, "bias", None) is None and getattr(norm, "running_mean", None) is None
