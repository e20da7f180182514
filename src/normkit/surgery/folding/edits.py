"""The edits of a fold: the layers take in a scale and a shift, and the norm is no more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import normkit
from normkit.norm import Norm
from normkit.surgery import recast
from normkit.surgery.folding import layers, rewrite
from normkit.surgery.folding.choose import Fold
from normkit.surgery.shortcut import has_hooks
from normkit.surgery.trace import Refused

Way = Literal["identity", "plain", "neutral", "rewrite"]
_FORWARDS = {
    cls.forward
    for cls in (
        nn.modules.batchnorm._BatchNorm,
        nn.SyncBatchNorm,
        nn.modules.instancenorm._InstanceNorm,
        nn.LayerNorm,
        nn.GroupNorm,
        nn.RMSNorm,
    )
}
_SWITCHES = ("affine", "elementwise_affine")


def named(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by all their names."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def way(model: nn.Module, fold: Fold, given: dict[nn.Module, dict[str, Any]], others: dict[nn.Module, str]) -> Way:
    """How the norm of a fold goes.

    Args:
        model: has the norm.
        fold: of it.
        given: with what each module was called.
        others: see :func:`normkit.surgery.observe.read_by_others`.

    Raises:
        Refused: it cannot; the message is a clause with the norm for its subject.
    """
    owners = {id(model.get_submodule(site.owner)): site.owner for site in fold.sites}
    if len(owners) > 1:
        raise Refused(f"is applied in several modules ({', '.join(owners.values())})")
    owner = model.get_submodule(fold.site.owner)
    if has_hooks(owner):
        raise Refused("has hooks, which would see another value; remove them first")
    if parametrize.is_parametrized(owner):
        raise Refused("has parametrizations; remove them with torch.nn.utils.parametrize.remove_parametrizations first")
    plain = is_a_plain_norm(owner) and model.get_submodule(fold.site.home(model)) is owner
    if fold.site.input is None:
        return "plain" if plain and owner not in others else "neutral"
    if plain and fold.site.skip is None:
        if owner in others:
            raise Refused(f"is read by the code of {others[owner]}, which would look for its weight in vain")
        return "identity"
    _rewritten(model, fold, given)
    return "rewrite"


def is_a_plain_norm(module: nn.Module) -> bool:
    """Whether the forward is that of torch's or normkit's norm, and reads nothing but weight, bias and statistics."""
    if "forward" in vars(module):
        return False
    return type(module).forward in _FORWARDS or type(module) in recast.twins().values()


def _rewritten(model: nn.Module, fold: Fold, given: dict[nn.Module, dict[str, Any]]) -> nn.Module:
    owner = model.get_submodule(fold.site.owner)
    tensors = named(model)
    constants = [tensors[name] for name in fold.site.constants.names()]
    try:
        return rewrite.without(owner, constants, fold.site.skip is not None, given.get(owner))
    except Refused as refused:
        place = fold.site.owner or "the model"
        raise Refused(f"is written in the code of {place} ({type(owner).__name__}), whose forward {refused}") from None


@dataclass
class Absorb:
    """Let the layers of a fold take in its norm. An edit of :mod:`normkit.surgery.operate`."""

    model: nn.Module
    fold: Fold
    way: Way
    given: dict[nn.Module, dict[str, Any]] = field(default_factory=dict)
    undoing: list[Callable[[], None]] = field(init=False, default_factory=list)

    def apply(self) -> None:
        fold, tensors = self.fold, named(self.model)
        scale, shift = fold.site.constants.affine(tensors)
        after = None if self.way != "rewrite" else _rewritten(self.model, fold, self.given)
        trains = [tensors[n].requires_grad for n in (fold.site.constants.bias, fold.site.constants.weight) if n]
        for used, inner in fold.uses:
            weight = tensors[used.weight]
            bias = tensors.get(used.bias or f"{used.owner}.bias".lstrip("."))  # one from the fold before, perhaps
            new_bias: Tensor | None
            wide = weight.detach().double(), None if bias is None else bias.detach().double()
            if fold.side == "before":
                zero = torch.zeros_like(scale) if shift is None else shift
                new_weight, new_bias = layers.behind(used, *wide, scale, zero)
            else:
                each = None if shift is None else shift.repeat_interleave(inner)
                new_weight, new_bias = layers.ahead(used, *wide, scale.repeat_interleave(inner), each)
            self._set(weight, new_weight)
            if bias is not None and new_bias is not None:
                self._set(bias, new_bias)
            elif new_bias is not None:
                layer = self.model.get_submodule(used.owner)
                moved = nn.Parameter(new_bias.to(weight), requires_grad=next(iter(trains), weight.requires_grad))
                layer.register_parameter("bias", moved)
                self.undoing.append(lambda layer=layer: layer.register_parameter("bias", None))  # type: ignore[misc]
        self._remove(self.model.get_submodule(fold.site.owner), after)

    def objections(self) -> list[str]:
        return []

    def revert(self) -> None:
        while self.undoing:
            self.undoing.pop()()

    def _set(self, tensor: Tensor, value: Tensor) -> None:
        before = tensor.detach().clone()
        with torch.no_grad():
            tensor.copy_(value)

        def put_back() -> None:
            with torch.no_grad():
                tensor.copy_(before)

        self.undoing.append(put_back)

    def _remove(self, owner: nn.Module, rewritten: nn.Module | None) -> None:
        if self.way == "neutral":
            tensors, constants = named(self.model), self.fold.site.constants
            for name, value in ((constants.weight, 1.0), (constants.bias, 0.0)):
                if name is not None:
                    self._set(tensors[name], torch.full_like(tensors[name], value))
            return
        before, kind = dict(vars(owner)), type(owner)
        self.undoing.append(lambda: _become(owner, kind, before))
        if self.way == "plain":
            state = {**before, "_parameters": {**owner._parameters, "weight": None, "bias": None}}
            if "bias" not in owner._parameters:
                del state["_parameters"]["bias"]
            _become(owner, kind, state | {name: False for name in _SWITCHES if name in before})
            return
        ours = isinstance(owner, Norm)
        after = rewritten or (normkit.Identity(activation=owner.activation) if ours else nn.Identity())  # type: ignore[arg-type]
        after.training = owner.training
        _become(owner, type(after), vars(after))


def _become(module: nn.Module, kind: type[nn.Module], state: dict[str, Any]) -> None:
    """The same object, under all its names, with another class and content."""
    vars(module).clear()
    vars(module).update(state)
    module.__class__ = kind
