"""A torch layer becomes normkit's layer of the same name: the same object, with another class.

The object stays, and with it every name it is registered under, its parameters and buffers, hooks, mode, and whatever
else holds on to it. normkit's classes are subclasses of torch's, so all that is missing is the options they add.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkit import norms  # noqa: F401  # the registry is full once they are imported
from normkit.norm import Norm
from normkit.statistics.buffers import NAMES
from normkit.vocabulary.spec import REGISTRY

_STORES = ("_parameters", "_buffers", "_modules")
_TORCH_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
_NAMED_NORM = re.compile(r"Norm(?:Act)?(?:[123]d)?$")


def twins() -> dict[type[nn.Module], type[Norm]]:
    """torch's class -> normkit's, for every norm that has both and is one."""
    return {
        getattr(nn, family.spec.twin.removeprefix("torch.nn.").format(dim=dim)): cls
        for family in REGISTRY.values()
        if family.spec.twin and family.spec.over is not None
        for dim, cls in family.classes.items()
    }


def looks_like_a_norm(module: nn.Module) -> bool:
    """Whether a reader of the certificate expects a line about it."""
    return isinstance(module, _TORCH_NORMS)


def is_norm(module: nn.Module) -> bool:
    """Whether it is a norm of torch's or normkit's."""
    return isinstance(module, Norm) or looks_like_a_norm(module)


def is_called_a_norm(module: nn.Module) -> bool:
    """Whether somebody has written a norm of their own, to go by its name: ``LlamaRMSNorm``, ``LayerNorm2d``."""
    return not is_norm(module) and _NAMED_NORM.search(type(module).__name__) is not None


def reasons_against(module: nn.Module, table: Mapping[type, type] | None = None) -> list[str]:
    """Why a layer cannot become normkit's, as sentences; empty: it can. ``table``: :func:`twins`, or more classes."""
    kind, table = type(module), twins() if table is None else table
    if isinstance(module, Norm):
        return ["it is normkit's already"]
    if parametrize.is_parametrized(module):
        return ["it has parametrizations; remove them with torch.nn.utils.parametrize.remove_parametrizations first"]
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return ["its size is not known yet; run one batch through the model first"]
    if kind not in table:
        own = next((base for base in kind.__mro__ if base in table), None)
        if own is None:
            return [f"normkit has no layer in the place of {kind.__name__}"]
        return [f"{kind.__module__}.{kind.__qualname__} is a subclass of {own.__name__} and may compute something else"]
    if "forward" in vars(module):
        return ["its forward has been replaced on the object"]
    return []


@dataclass
class Recast:
    """Give a torch layer normkit's class. An edit of :mod:`normkit.surgery.operate`."""

    module: nn.Module
    after: Any = None
    """normkit's class; ``None``: the twin."""
    before: type[nn.Module] = field(init=False)
    added: dict[str, list[str]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.before = type(self.module)
        self.after = self.after or twins()[self.before]

    def apply(self) -> None:
        fresh = _fresh(self.module, self.after, self.before)
        if hasattr(fresh, "low_precision_buffers"):  # what the layer keeps in half precision stays so
            kept = [getattr(self.module, name) for name in NAMES]
            fresh.low_precision_buffers = any(b is not None and b.dtype.itemsize < 4 for b in kept)
        place = next(iter(self.module.buffers()), next(iter(self.module.parameters()), torch.empty(0))).device
        ours = vars(self.module)
        self.added = {"": [name for name in vars(fresh) if name not in ours]}
        for name in self.added[""]:
            ours[name] = vars(fresh)[name]
        for store in _STORES:
            self.added[store] = [name for name in vars(fresh)[store] if name not in ours[store] and name not in ours]
            for name in self.added[store]:
                value = vars(fresh)[store][name]
                ours[store][name] = torch.zeros_like(value, device=place) if isinstance(value, Tensor) else value
        self.added["_non_persistent_buffers_set"] = list(
            fresh._non_persistent_buffers_set - self.module._non_persistent_buffers_set
        )
        self.module._non_persistent_buffers_set |= fresh._non_persistent_buffers_set
        self.module.__class__ = self.after

    def objections(self) -> list[str]:
        kind = type(self.module)
        return [] if kind is self.after else [f"its class is now {kind.__module__}.{kind.__qualname__}"]

    def revert(self) -> None:
        self.module.__class__ = self.before
        ours = vars(self.module)
        self.module._non_persistent_buffers_set.difference_update(self.added["_non_persistent_buffers_set"])
        for store in _STORES:
            for name in self.added[store]:
                ours[store].pop(name, None)
        for name in self.added[""]:
            ours.pop(name, None)


@dataclass
class Uncast:
    """Give torch's class back to a layer that was recast, however long ago. An edit as :class:`Recast` is."""

    module: nn.Module
    after: type[nn.Module]
    before: type[nn.Module] = field(init=False)
    removed: dict[str, dict[str, Any]] = field(init=False, default_factory=dict)
    counters: set[str] = field(init=False, default_factory=set)

    def apply(self) -> None:
        self.before = type(self.module)
        ours, torchs = (vars(_fresh(self.module, cls, self.after)) for cls in (self.before, self.after))
        state = vars(self.module)
        for store in ("", *_STORES):
            place, more, plain = (state, ours, torchs) if not store else (state[store], ours[store], torchs[store])
            names = [name for name in more if name not in plain and name in place]
            self.removed[store] = {name: place.pop(name) for name in names}
        self.counters = ours["_non_persistent_buffers_set"] & self.module._non_persistent_buffers_set
        self.module._non_persistent_buffers_set -= self.counters
        self.module.__class__ = self.after

    def objections(self) -> list[str]:
        kind = type(self.module)
        return [] if kind is self.after else [f"its class is now {kind.__module__}.{kind.__qualname__}"]

    def revert(self) -> None:
        self.module.__class__ = self.before
        state = vars(self.module)
        for store, values in self.removed.items():
            (state[store] if store else state).update(values)
        self.module._non_persistent_buffers_set |= self.counters


def _fresh(module: nn.Module, cls: type[nn.Module], torchs: type[nn.Module]) -> Any:
    """A layer with the arguments that torch's constructor had; on ``meta``, so that it costs nothing.

    torch's norms keep every argument under its own name, but for ``bias``, whose name the parameter has.
    """
    names = [name for name in inspect.signature(torchs).parameters if name not in ("device", "dtype", "bias")]
    with torch.device("meta"):
        return cls(**{name: getattr(module, name) for name in names})
