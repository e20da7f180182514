"""Which modules are norms and which activations, and how a norm pools its input, whoever wrote the class."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from normkit.layout import roles, solve
from normkit.moments import Moments
from normkit.norm import Norm
from normkit.statistics.masking import as_mask

BATCH, INSTANCE, GROUP, LAYER = "[n] c [s...]", "n c [s...]", "n (g [c]) [s...]", "n... [c...]"
_RMS_BY_NAME = re.compile(r"RMS_?Norm", re.IGNORECASE)
_ACTIVATION_BY_NAME = re.compile(r"ReLU|GELU|SiLU|Swish|Mish|Sigmoid|Tanh|ELU|Softplus", re.IGNORECASE)
_ACTIVATIONS = (
    nn.Sigmoid, nn.Tanh, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.PReLU, nn.RReLU,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Laid:
    """An input of a norm with its axes as the pattern names them."""

    x: Tensor
    pooled: tuple[int, ...]
    keep: Tensor | None = None
    """Of bool and of the shape of ``x``: what counts; ``None``: everything."""

    @property
    def count(self) -> Tensor:
        """How many values share a mean; of no axes, or like the mean."""
        if self.keep is not None:
            return self.keep.sum(self.pooled)
        return torch.tensor(prod(self.x.shape[axis] for axis in self.pooled))

    def mean_and_variance(self) -> tuple[Tensor, Tensor]:
        """Of each unit; the variance is the biased one."""
        moments = Moments.measure(self.x, self.pooled, self.keep)
        return moments.mean, moments.var()


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

    def lay(self, x: Tensor, given: Mapping[str, Any]) -> Laid | None:
        """The pattern laid over an input; ``None``: it does not fit. ``given``: the keyword arguments of the call."""
        keep = self._mask(x, given)
        if self.pattern == INSTANCE and x.dim() < 3:
            x = x.unsqueeze(0)
        if self.channels_first or (self.channels_first is None and not self._ends_as_expected(x)):
            x, keep = x.movedim(1, -1), None if keep is None else keep.movedim(1, -1)
        try:
            layout = solve(self.pattern, tuple(x.shape), groups=self.groups, trailing=len(self.trailing) or 1)
        except ValueError:
            return None
        return Laid(x.reshape(layout.view), layout.pooled, None if keep is None else keep.reshape(layout.view))

    def _mask(self, x: Tensor, given: Mapping[str, Any]) -> Tensor | None:
        mask, lengths = given.get("mask"), given.get("lengths")
        if mask is None and lengths is None:
            return None
        axes = roles(self.pattern, x.dim(), len(self.trailing) or 1)[2]
        keep = as_mask(x, mask, lengths, axes=axes, what=self.pattern)
        return None if keep is None else keep.expand_as(x)

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


def carried_out(model: nn.Module) -> set[int]:
    """The ids of activations that norms carry out: their values are the norm's, and a hook would part the kernel."""
    return {id(module.activation) for module in model.modules() if isinstance(module, Norm)}


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
