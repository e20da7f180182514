"""Layers by name: ``create``, ``factory``, ``list_norms``."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from normkit.norms import MENU
from normkit.vocabulary.spec import REGISTRY, Family, find

Name = str | tuple[str, Mapping[str, Any]] | None


def list_norms() -> list[str]:
    """The names of all norms, in the order of the tables; those that a user has defined come last.

    >>> import normkit as nk
    >>> nk.list_norms()[:3]
    ['batch_norm', 'layer_norm', 'rms_norm']
    """
    menu = [module.SPEC.name for module in MENU]
    return menu + [name for name in REGISTRY if name not in menu]


def create(name: Name, num_channels: int, *, dim: int = 2, **options: Any) -> nn.Module:
    """Make a layer from the name that people type.

    Args:
        name: ``"batch"``, ``"bn"``, ``"BatchNorm2d"``, ``"group:32"``, ``("group", {"num_groups": 8})``, ``"none"``,
            ``"batch:ghost:16"`` (a batch norm with a policy of :mod:`normkit.statistics`); case and underscores do not
            matter, and a trailing ``1d``/``2d``/``3d`` goes before ``dim``. ``None`` is ``"none"``.
        num_channels: c of the input, whatever position it has in the layer's own constructor.
        dim: how many spatial axes the input has. 1: (n, c), (n, c, l) and, for layer norm, RMS norm and DyT,
            (n..., c); 2: (n, c, h, w); 3: (n, c, d, h, w), where these three normalise over the channels
            (``channels_first=True``).
        options: keyword arguments of the layer (``eps=``, ``activation=`` ...).

    Returns:
        The layer.

    Raises:
        ValueError: no such norm, dimension or value; the message names the nearest.
        TypeError: an option that the layer does not have.

    >>> import normkit as nk
    >>> nk.create("group:8", 64, activation="relu")
    GroupNorm(
      8, 64, eps=1e-05, affine=True, bias=True
      (activation): ReLU()
    )
    """
    family, dim, preset = _read(name, dim)
    merged = {**preset, **options}
    cls = family.pick(dim)
    _check_options(family, cls, merged)
    return cls.for_channels(num_channels, dim=dim, **merged)  # type: ignore[attr-defined]


def factory(name: Name, *, dim: int = 2, **options: Any) -> functools.partial[nn.Module]:
    """A picklable callable ``num_channels -> layer`` for the ``norm_layer=`` argument of torchvision and timm models.

    It is a ``functools.partial``, which timm asks for and takes apart. A module among the options is copied for each
    layer; more options can be given with the number of channels. timm's EfficientNets want timm's own layers of norm
    and activation, with options of their own, and cannot take it.

    Args:
        name: as in :func:`create`.
        dim: as in :func:`create`.
        options: keyword arguments of the layer.

    Raises:
        ValueError: no such norm; at once, not when the model is built.
        TypeError: an option that the layer does not have.

    >>> import normkit as nk
    >>> nk.factory("batch", activation="relu")(16)
    BatchNorm2d(
      16, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True
      (activation): ReLU()
    )
    """
    family, read_dim, preset = _read(name, dim)
    _check_options(family, family.pick(read_dim), {**preset, **options})
    return functools.partial(_layer, name=name, dim=dim, **options)


def _layer(num_channels: int, *, name: Name, dim: int, **options: Any) -> nn.Module:
    """What the result of :func:`factory` calls: an activation that is a module is not shared between layers."""
    return create(copy.deepcopy(name), num_channels, dim=dim, **copy.deepcopy(options))


def _read(name: Name, dim: int) -> tuple[Family, int, dict[str, Any]]:
    """The family, the dimension and the preset options in a name."""
    preset: dict[str, Any] = {}
    text: Any = "none" if name is None else name
    if isinstance(name, tuple):
        if len(name) != 2 or not isinstance(name[1], Mapping):
            raise ValueError(f'{name!r}: a norm as a tuple is (name, options), as in ("group", {{"num_groups": 8}})')
        text, preset = name[0], dict(name[1])
    if not isinstance(text, str):
        raise TypeError(f"a norm is named by a string or a (name, options) tuple, not by {text!r}")
    word, colon, value = text.partition(":")
    family, named_dim = find(word)
    if colon:
        preset = {**_shorthand(family, text, value), **preset}
    dim = dim if named_dim is None else named_dim
    if dim not in (1, 2, 3):
        raise ValueError(f"dim={dim!r}: the input has 1, 2 or 3 spatial axes; (n, c) counts as 1")
    return family, dim, preset


def _shorthand(family: Family, text: str, value: str) -> dict[str, Any]:
    """``"group:32"`` -> ``{"num_groups": 32}``; the default of the argument says which kind of number it is."""
    argument = family.spec.shorthand
    if argument is None:
        raise ValueError(f"{text!r}: {family.spec.name} takes no value after a colon")
    cls = next(iter(family.classes.values()))
    default = _parameters(cls)[argument].default
    if default is None:  # a name, which the layer reads itself
        return {argument: value}
    kind, words = (float, "number") if isinstance(default, float) else (int, "whole number")
    try:
        number = kind(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{text!r}: {value!r} is no {words} for {argument}, as in {family.spec.name}:{default}")
    return {argument: number}


def _check_options(family: Family, cls: type, options: Mapping[str, Any]) -> None:
    """Refuse a misspelt option with the list of those there are."""
    accepted = _parameters(cls).keys() - {"num_channels", "dim", "num_features", "normalized_shape"}
    unknown = sorted(set(options) - accepted)
    if unknown:
        raise TypeError(
            f"{family.spec.name} has no option {', '.join(map(repr, unknown))}.\n"
            f"  choose from: {', '.join(sorted(accepted))}"
        )


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    """What a layer can be given by name; ``for_channels`` has defaults that the constructor lacks."""
    return {
        name: parameter
        for function in (cls, cls.for_channels)  # type: ignore[attr-defined]
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
