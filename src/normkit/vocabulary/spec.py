"""Spec: what a norm is. Family: the classes that carry it out. REGISTRY: every norm there is, by name."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from typing import Any

LAWS = (
    "scale",
    "shift",
    "sample_scale",
    "sample_shift",
    "channel_scale",
    "channel_shift",
    "sample",
    "channel",
    "restores",
)
"""The names of all laws, in the order of the tables; normkit.laws says what each one means."""


@dataclass(frozen=True, slots=True)
class Spec:
    """What a norm is, defined once: everything else reads this.

    ``over`` is a pattern: brackets mark the axes that share a mean and a variance, ``...`` stands for any number of
    axes, parentheses open one axis into two. ``None`` means that the norm pools nothing (DyT),
    or what no pattern says; ``pools`` then has it in words.
    """

    name: str
    """Function, file, registry key, test id, bench row and docs anchor."""
    summary: str
    """One sentence for tables."""
    over: str | None
    center: bool
    """Whether the mean is subtracted."""
    laws: frozenset[str]
    """The laws it obeys. Every law that is not named is claimed not to hold, and tests look for the witness."""
    twin: str | None
    """The torch class it is a drop-in for; ``{dim}`` stands for 1, 2, 3."""
    paper: str
    aliases: tuple[str, ...] = ()
    """Further names that people type; case, underscores and a trailing ``1d``/``2d``/``3d`` do not matter."""
    shorthand: str | None = None
    """The argument that ``name:value`` sets, as in ``group:32``."""
    pools: str = ""
    """What is pooled, for tables, where no pattern says it."""

    def __post_init__(self) -> None:
        unknown = self.laws - set(LAWS)
        if unknown:
            raise ValueError(f"{self.name}: unknown laws {sorted(unknown)}; the laws are {', '.join(LAWS)}")


@dataclass(slots=True)
class Family:
    """The classes of one spec: by number of spatial dimensions (``None``: one class serves all), plain and lazy."""

    spec: Spec
    classes: dict[int | None, type] = field(default_factory=dict)
    lazy: dict[int | None, type] = field(default_factory=dict)

    def pick(self, dim: int, *, lazy: bool = False) -> type:
        """The class for ``dim`` spatial dimensions."""
        classes = self.lazy if lazy else self.classes
        chosen = classes.get(None) or classes.get(dim)
        if chosen is None:
            kind = "lazy class" if lazy else "class"
            have = ", ".join(str(key) for key in classes) or "none"
            raise ValueError(f"{self.spec.name}: there is no {kind} for dim={dim}.\n  choose dim from: {have}")
        return chosen


REGISTRY: dict[str, Family] = {}


def register(cls: type, spec: Spec, *, dim: int | None, lazy: bool) -> None:
    """Enter a class into the registry. One spec per name and one class per dimension; a second one is refused."""
    family = REGISTRY.setdefault(spec.name, Family(spec))
    if family.spec is not spec:
        raise ValueError(f"a norm named {spec.name!r} is already registered; choose another name")
    classes = family.lazy if lazy else family.classes
    if dim in classes:
        raise ValueError(f"{spec.name} already has the class {classes[dim].__qualname__} for dim={dim}")
    classes[dim] = cls


def plain(name: str) -> tuple[str, int | None]:
    """``"Batch_Norm2d"`` -> ``("batchnorm", 2)``: the name as the registry compares it, and the dimension in it."""
    key = re.sub(r"[\s_\-]", "", name.lower())
    match = re.fullmatch(r"(.+?)([123])d", key)
    return (match[1], int(match[2])) if match else (key, None)


def find(name: str) -> tuple[Family, int | None]:
    """The family of a name that a person typed, and the dimension when the name holds one (``batchnorm2d``).

    Raises:
        ValueError: no norm has that name; the message names the nearest.
    """
    key, dim = plain(name)
    known = {plain(alias)[0]: family for family in REGISTRY.values() for alias in _names(family.spec)}
    if key in known:
        return known[key], dim
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    suggestion = f"  did you mean {known[near[0]].spec.name!r}?\n" if near else ""
    raise ValueError(f"there is no norm named {name!r}.\n{suggestion}  choose from: {', '.join(sorted(REGISTRY))}")


def _names(spec: Spec) -> tuple[str, ...]:
    return (spec.name, *spec.aliases)


def pooled(spec: Spec) -> str:
    """What it pools over, for tables."""
    return spec.over or spec.pools or "nothing"


def attributes(spec: Spec) -> dict[str, Any]:
    """The spec as plain data, for tables and ``--json``."""
    return {
        "name": spec.name,
        "summary": spec.summary,
        "over": spec.over,
        "pools": pooled(spec),
        "center": spec.center,
        "laws": {law: law in spec.laws for law in LAWS},
        "twin": spec.twin,
        "paper": spec.paper,
        "aliases": list(spec.aliases),
    }
