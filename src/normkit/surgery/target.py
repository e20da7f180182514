"""What stands in the place of a norm that is converted: a layer of another kind, with what the old one has learnt."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkit.create import create
from normkit.norm import Norm
from normkit.vocabulary.spec import REGISTRY, Family, find

Kind = str | tuple[str, Mapping[str, Any]] | Callable[[int], nn.Module] | None
AUTO, PER_GROUP = "auto", 16
"""``group:auto`` looks for about 16 channels per group, the number that Wu & He 2018 (table 3) found best."""
FROZEN = ("frozen_batch", "frozenbatch", "frozen")
_NO_PLACE = {"global_response_norm": "adds to its input and stands beside a norm, not in the place of one"}
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Misfit(Exception):
    """Why a layer cannot be converted, as a sentence."""


@dataclass(frozen=True)
class Place:
    """Where a norm stands: what its channels are, and where."""

    shape: tuple[int, ...]
    """(c,), or the sizes of the last axes that a layer norm has."""
    dim: int | None
    """Axes of space; ``None``: the layer takes any number."""
    last: bool = False
    """The channels are the last axes, and not axis 1."""


def place_of(layer: nn.Module) -> Place:
    """Where the layer stands.

    Raises:
        Misfit: it cannot be converted.
    """
    _check_kind(layer)
    known: Any = layer
    if hasattr(layer, "normalized_shape"):
        first = getattr(layer, "channels_first", False)
        return Place(tuple(known.normalized_shape), None, last=not first)
    channels = getattr(layer, "num_features", None) or getattr(layer, "num_channels", None)
    if not channels:
        raise Misfit(f"{type(layer).__name__} does not say how many channels it has")
    digit = type(layer).__name__[-2:-1]
    return Place((channels,), int(digit) if digit in ("1", "2", "3") else None)


def _check_kind(layer: nn.Module) -> None:
    kind = type(layer)
    ours = {cls for family in REGISTRY.values() for cls in (*family.classes.values(), *family.lazy.values())}
    own = next((base for base in kind.__mro__ if base in ours or base.__module__.startswith("torch.nn.")), None)
    if isinstance(layer, Norm) and layer.spec.name in _NO_PLACE:
        raise Misfit(f"{kind.__name__} {_NO_PLACE[layer.spec.name]}")
    if isinstance(layer, Norm) and getattr(layer, "activates", False):
        raise Misfit(f"{kind.__name__} is an activation as well, which would be lost")
    if isinstance(layer, nn.LocalResponseNorm):
        raise Misfit(
            "LocalResponseNorm pools over neighbouring channels, and learns nothing that could be carried over"
        )
    if parametrize.is_parametrized(layer):
        raise Misfit(
            "it has parametrizations; remove them with torch.nn.utils.parametrize.remove_parametrizations first"
        )
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin) and layer.has_uninitialized_params():
        raise Misfit("its size is not known yet; run one batch through the model first")
    if own is not None and own is not kind and kind.__module__.partition(".")[0] != "normkit":
        raise Misfit(
            f"{kind.__module__}.{kind.__qualname__} is a subclass of {own.__name__} and may compute something else"
        )
    if "forward" in vars(layer):
        raise Misfit("its forward has been replaced on the object")


def build(
    to: Kind, layer: nn.Module, place: Place, *, learn: bool, dim: int | None = None, among: nn.Module | None = None
) -> nn.Module:
    """The layer of the kind ``to`` for this place, with the weight, bias and options of ``layer``.

    Args:
        to: a name, or a callable ``number of channels -> layer``.
        layer: the norm that stands there.
        place: of :func:`place_of`.
        learn: give it a weight and a bias though the old layer has none, because they will be fitted.
        dim: axes of space as they were seen.
        among: the model, whose device and type the layer has where the old one has no tensor that would tell.

    Raises:
        Misfit: it does not fit here.
    """
    if callable(to):
        fresh = to(place.shape[0] if len(place.shape) == 1 else place.shape)  # type: ignore[arg-type]
        if not isinstance(fresh, nn.Module):
            raise TypeError(f"convert_: to= returned a {type(fresh).__name__}; it has to return a layer")
    else:
        fresh = _by_name(to, layer, place, learn, place.dim or dim)
    around = () if among is None else among.parameters()
    tensors = itertools.chain(layer.parameters(False), layer.buffers(False), around)
    like = next((t for t in tensors if t.is_floating_point()), None)
    if like is not None:
        fresh.to(like.device, like.dtype)
    fresh.train(layer.training)
    _hand_over_activation(layer, fresh)
    carry(layer, fresh)
    return fresh


def is_frozen_batch(to: Kind) -> bool:
    """Whether the name is that of a batch norm that normalises by running statistics for good."""
    return isinstance(to, str) and to.lower() in FROZEN


def groups(channels: int) -> int:
    """How many groups ``group:auto`` makes: of a divisor of the channels that is nearest to 16, by ratio."""
    divisors = [size for size in range(1, channels + 1) if channels % size == 0]
    return channels // min(divisors, key=lambda size: abs(math.log(size / PER_GROUP)))


def _by_name(to: Any, layer: nn.Module, place: Place, learn: bool, dim: int | None) -> nn.Module:
    family, name, given = _read(to, place)
    accepts = _parameters(family)
    options = {key: value for key, value in _options(layer, learn).items() if key in accepts and key not in given}
    if "channels_first" in accepts:
        options["channels_first"] = not place.last
    elif place.last and family.spec.name != "identity":
        raise Misfit(f"its channels are the last axis, and {family.spec.name} takes them on axis 1")
    if None not in family.classes and dim is None:
        raise Misfit(f"{family.spec.name} wants to know how many axes of space there are; give match=, a batch")
    size: Any = place.shape[0] if len(place.shape) == 1 else place.shape
    try:
        fresh = create((name, {**options, **given}), size, dim=dim or 1)
    except ValueError as error:
        raise Misfit(" ".join(str(error).split())) from None
    if is_frozen_batch(to):
        fresh.frozen = True  # type: ignore[assignment]
    return fresh


def _read(to: Any, place: Place) -> tuple[Family, str, dict[str, Any]]:
    """The family, its name as ``create`` takes it, and the options that ``to`` names."""
    if is_frozen_batch(to):
        to = "batch"
    name, given = (to[0], dict(to[1])) if isinstance(to, tuple) else (to or "none", {})
    word, _, value = name.partition(":")
    family = find(word)[0]
    if family.spec.name == "group_norm" and value == AUTO:
        return family, word, {"num_groups": groups(place.shape[0]), **given}
    return family, name, given


def _parameters(family: Family) -> set[str]:
    classes: list[Any] = [*family.classes.values()]
    return {name for cls in classes for f in (cls, cls.for_channels) for name in inspect.signature(f).parameters}


def _options(layer: Any, learn: bool) -> dict[str, Any]:
    """What a layer says of itself that means the same in every kind of norm."""
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    affine = learn or weight is not None
    eps = getattr(layer, "eps", None)
    options = {"affine": affine, "elementwise_affine": affine, "bias": learn or bias is not None}
    return options if eps is None else {**options, "eps": eps}


def _hand_over_activation(layer: nn.Module, fresh: nn.Module) -> None:
    activation = layer.activation if isinstance(layer, Norm) else None
    if activation is None:
        return
    if not isinstance(fresh, Norm):
        raise Misfit(f"it activates by {activation}, which {type(fresh).__name__} of the new kind does not")
    if fresh.activation is None:
        fresh.activation = activation


@torch.no_grad()
def carry(layer: nn.Module, fresh: nn.Module) -> None:
    """Copy weight, bias and running statistics, where both have them and they mean the same."""
    for name, neutral in (("weight", 1.0), ("bias", 0.0)):
        old, new = layer._parameters.get(name), fresh._parameters.get(name)
        if old is not None and new is not None and old.shape == new.shape and bool((new == neutral).all()):
            new.copy_(old)
            new.requires_grad = old.requires_grad
    for name in _STATISTICS:
        had, has = layer._buffers.get(name), fresh._buffers.get(name)
        if had is not None and has is not None and had.shape == has.shape:
            has.copy_(had)


def lost(layer: nn.Module, fresh: nn.Module) -> list[str]:
    """What the old layer has learnt and the new one has no place for."""
    neutral = {"weight": 1.0, "bias": 0.0}
    return [
        name
        for name, value in neutral.items()
        if (old := layer._parameters.get(name)) is not None and bool((old != value).any())
        if not isinstance(new := fresh._parameters.get(name), Tensor) or new.shape != old.shape
    ]
