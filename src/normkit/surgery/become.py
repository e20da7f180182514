"""A layer becomes another kind of layer: the same object, with the class and the content of one that was just built.

The object stays, and with it every name and parent it has, its hooks and its mode; a parameter or buffer that the new
kind has under the same name and of the same shape stays the same object too, so that optimizers and ties keep it.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normkit.surgery import preserve

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_OWN = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
"""Of what every module has: what the new layer brings. The rest (mode, hooks) is the old one's."""
_AFTER_LOADING = "_load_state_dict_post_hooks"


@dataclass
class Become:
    """Turn ``layer`` into ``fresh``. An edit of :mod:`normkit.surgery.operate`."""

    layer: nn.Module
    fresh: nn.Module
    """Built and filled for this layer; it gives away its content."""
    before: tuple[type[nn.Module], dict[str, Any]] | None = field(init=False, default=None)
    written: list[tuple[Tensor, Tensor, Tensor]] = field(init=False, default_factory=list)
    """What stayed with another value: the place, the old value, the new one."""

    def adopted(self, store: str) -> dict[str, Tensor]:
        """By name, the parameters (or buffers) that stay the objects they are."""
        old, new = vars(self.layer)[store], vars(self.fresh)[store]
        return {
            name: old[name]
            for name, tensor in new.items()
            if tensor is not None and old.get(name) is not None
            if (old[name].shape, old[name].dtype, old[name].device) == (tensor.shape, tensor.dtype, tensor.device)
        }

    def added(self) -> dict[str, nn.Parameter]:
        """By name, the parameters that the layer did not have."""
        kept, children = self.adopted("_parameters"), set(self.layer.children())
        own = {name: p for name, p in self.fresh._parameters.items() if p is not None and name not in kept}
        for name, child in self.fresh.named_children():
            if child not in children:
                own |= {f"{name}.{inner}": p for inner, p in child.named_parameters()}
        return own

    def removed(self) -> dict[str, nn.Parameter]:
        """By name, the parameters that the layer has no longer."""
        kept, children = self.adopted("_parameters"), set(self.fresh.children())
        own = {name: p for name, p in self.layer._parameters.items() if p is not None and name not in kept}
        for name, child in self.layer.named_children():
            if child not in children:
                own |= {f"{name}.{inner}": p for inner, p in child.named_parameters()}
        return own

    def changes(self, name: str) -> set[str]:
        """The facts of :mod:`normkit.surgery.preserve` that are meant to change, for one name of the layer."""
        of = lambda own: f"{name}.{own}".lstrip(".")
        kept = {own for store in ("_parameters", "_buffers") for own in self.adopted(store)}
        gone = [own for own in self.layer.state_dict() if own not in kept]
        come = [own for own in self.fresh.state_dict() if own not in kept]
        buffers = [own for own, _ in self.layer.named_buffers() if own not in kept]
        parts = dict(self.fresh.named_modules())
        children = [own for own, part in self.layer.named_modules() if own and parts.get(own) is not part]
        return {
            *(preserve.key(of(own)) for own in (*gone, *come)),
            *(preserve.buffer(of(own)) for own in buffers),
            *(fact(of(own)) for own in self.removed() for fact in (preserve.parameter, preserve.trains)),
            *(fact for own in children for fact in preserve.of_module(of(own))),
        }

    def apply(self) -> None:
        old, new = vars(self.layer), vars(self.fresh)
        self.before = type(self.layer), {name: _copied(name, value) for name, value in old.items()}
        kept = {store: self.adopted(store) for store in ("_parameters", "_buffers")}
        state = {name: value for name, value in old.items() if name in _OF_EVERY_MODULE or not self._belongs(name)}
        state |= {name: value for name, value in new.items() if name not in _OF_EVERY_MODULE}
        state |= {name: _copied(name, new[name]) for name in _OWN}
        state[_AFTER_LOADING] = {**old[_AFTER_LOADING], **new[_AFTER_LOADING]}
        with torch.no_grad():
            for store, tensors in kept.items():
                for name, tensor in tensors.items():
                    value = new[store][name]
                    if not torch.equal(tensor, value):
                        self.written.append((tensor, tensor.detach().clone(), value.detach().clone()))
                        tensor.copy_(value)
                    state[store][name] = tensor
        old.clear()
        old.update(state)
        self.layer.__class__ = type(self.fresh)

    def _belongs(self, name: str) -> bool:
        """Whether an attribute says how the old kind of layer was built, rather than what somebody put on it."""
        return any(
            name in inspect.get_annotations(kind) or name in inspect.signature(kind).parameters
            for kind in type(self.layer).__mro__
            if issubclass(kind, nn.Module) and kind is not nn.Module
        )

    def objections(self) -> list[str]:
        kind = type(self.layer)
        if kind is not type(self.fresh):
            return [f"its class is now {kind.__module__}.{kind.__qualname__}"]
        moved = any(not torch.equal(place, value) for place, _, value in self.written)
        return ["its weight or bias has moved since"] if moved else []

    def revert(self) -> None:
        assert self.before is not None
        kind, state = self.before
        with torch.no_grad():
            for place, value, _ in self.written:
                place.copy_(value)
        self.written = []
        now = {name: vars(self.layer)[name] for name in _OF_EVERY_MODULE if name not in _OWN}
        now.pop(_AFTER_LOADING)
        vars(self.layer).clear()
        vars(self.layer).update(state, **now)  # hooks and mode as they are now
        self.layer.__class__ = kind


def _copied(name: str, value: Any) -> Any:
    return value.copy() if name in (*_OWN, _AFTER_LOADING) else value
