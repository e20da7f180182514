"""Which modules are norms and which activations, and how a norm pools its input, whoever wrote the class."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normkit.layout import Layout, solve
from normkit.norm import Norm

BATCH, INSTANCE, GROUP, LAYER = "[n] c [s...]", "n c [s...]", "n (g [c]) [s...]", "n... [c...]"
_RMS_BY_NAME = re.compile(r"RMS_?Norm", re.IGNORECASE)
_ACTIVATION_BY_NAME = re.compile(r"ReLU|GELU|SiLU|Swish|Mish|Sigmoid|Tanh|ELU|Softplus", re.IGNORECASE)
_ACTIVATIONS = (
    nn.Sigmoid, nn.Tanh, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.PReLU, nn.RReLU,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Site:
    """A norm, and what of it a measurement has to know."""

    pattern: str
    center: bool
    eps: float | None
    """``None``: the machine epsilon of the arithmetic."""
    groups: int = 1
    trailing: tuple[int, ...] = ()
    channels_first: bool | None = False
    """A norm of the last axis that runs along axis 1; ``None``: the shape of the input has to tell."""

    @property
    def across_samples(self) -> bool:
        """Whether samples share statistics."""
        return self.pattern == BATCH

    def lay(self, x: Tensor) -> tuple[Tensor, Layout]:
        """The input with its axes as the pattern has them, and the pattern laid over it.

        Raises:
            ValueError: the pattern does not fit the input.
        """
        if self.channels_first or (self.channels_first is None and not self._ends_as_expected(x)):
            x = x.movedim(1, -1)
        if self.pattern in (INSTANCE, GROUP) and x.dim() < 3 and self.pattern == INSTANCE:
            x = x.unsqueeze(0)
        layout = solve(self.pattern, tuple(x.shape), groups=self.groups, trailing=len(self.trailing) or 1)
        return x.reshape(layout.view), layout

    def _ends_as_expected(self, x: Tensor) -> bool:
        return tuple(x.shape[-len(self.trailing) :]) == self.trailing


def norm_site(module: nn.Module) -> Site | None:
    """How the module pools; ``None``: it is no norm, or one that no pattern says."""
    eps: Any = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    match module:
        case nn.modules.batchnorm._BatchNorm():
            return Site(BATCH, True, eps)
        case nn.modules.instancenorm._InstanceNorm():
            return Site(INSTANCE, True, eps)
        case nn.GroupNorm():
            return Site(GROUP, True, eps, groups=module.num_groups)
        case nn.LayerNorm() | nn.RMSNorm():
            return Site(
                LAYER,
                isinstance(module, nn.LayerNorm),
                eps,
                trailing=tuple(module.normalized_shape),
                channels_first=_first(module),
            )
        case Norm() if module.spec.over is not None:
            return Site(module.spec.over, module.spec.center, eps)
        case _ if _RMS_BY_NAME.search(type(module).__name__) and isinstance(
            weight := getattr(module, "weight", None), Tensor
        ):
            return Site(LAYER, False, eps, trailing=tuple(weight.shape))
    return None


def _first(module: Any) -> bool | None:
    """Subclasses of torch's layer norm over the channels of images are common, and say so in many ways."""
    said = getattr(module, "channels_first", getattr(module, "data_format", None))
    if isinstance(said, bool | str):
        return said in (True, "channels_first")
    if type(module).__name__.endswith("2d"):
        return True
    return False if type(module) in (nn.LayerNorm, nn.RMSNorm) else None


def is_activation(module: nn.Module) -> bool:
    """An activation of torch's, or one that has the name of one (``NewGELUActivation``) and no parts."""
    if isinstance(module, _ACTIVATIONS):
        return True
    return _ACTIVATION_BY_NAME.search(type(module).__name__) is not None and not any(module.children())


def activation_of(module: nn.Module) -> nn.Module | None:
    """The activation whose values come out of the module: its own, or that which a norm of normkit's carries out."""
    if isinstance(module, Norm):
        return module.activation
    return module if is_activation(module) else None


def machine_eps(x: Tensor) -> float:
    """What torch's RMS norm adds where ``eps`` is ``None``."""
    return torch.finfo(x.dtype if x.is_floating_point() else torch.float32).eps


def wide(x: Tensor) -> Tensor:
    """In float32 or better."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def by_unit(x: Tensor) -> Tensor:
    """(values, units): axis 1 holds the units of (n, c) and images (n, c, h, w), the last axis those of (n, t, c)."""
    units = x if x.dim() == 3 else x.movedim(1, -1) if x.dim() > 1 else x.unsqueeze(0)
    return units.reshape(-1, units.shape[-1])
