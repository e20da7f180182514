"""Pattern and shape -> which axes pool, which carry a weight. Integers only; no torch.

The grammar is frozen: names, ``...``, one level of parentheses, brackets. A norm that needs more supplies its own
reference instead.

>>> solve("n (g [c]) [s...]", (8, 48, 14, 14), groups=4)
Layout(view=(8, 4, 12, 14, 14), pooled=(2, 3, 4), weighted=(1, 2))
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache

_TOKEN = re.compile(r"\(|\)|\[|\]|[a-z]\.\.\.|[a-z]|\s+|.")
_WEIGHTED = frozenset("gc")  # the weight of every norm runs along the channels, and a group is a part of them


@dataclass(frozen=True, slots=True)
class Axis:
    """One name of a pattern."""

    name: str
    pooled: bool
    many: bool
    """Followed by ``...``: any number of axes."""
    inside: bool
    """Inside parentheses: a part of one axis of the tensor."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A pattern on a shape. ``x.reshape(view)`` has the parentheses opened; axes are counted in that view."""

    view: tuple[int, ...]
    pooled: tuple[int, ...]
    weighted: tuple[int, ...]

    @property
    def weight_view(self) -> tuple[int, ...]:
        """The shape in which a weight broadcasts against the view."""
        return tuple(size if axis in self.weighted else 1 for axis, size in enumerate(self.view))

    @property
    def values(self) -> int:
        """How many values share one mean and one variance."""
        return math.prod(self.view[axis] for axis in self.pooled)

    @property
    def statistics(self) -> int:
        """How many means and variances there are."""
        return math.prod(size for axis, size in enumerate(self.view) if axis not in self.pooled)


@lru_cache(maxsize=256)
def parse(pattern: str) -> tuple[Axis, ...]:
    """The axes of a pattern, in order. Raises ValueError on anything outside the grammar."""
    axes: list[Axis] = []
    opened: list[str] = []
    for token in _TOKEN.findall(pattern):
        if token.isspace():
            continue
        if token in "([":
            if token in opened:
                raise ValueError(f"pattern {pattern!r}: more than one level of {token!r}")
            opened.append(token)
        elif token in ")]":
            if not opened or opened.pop() != {")": "(", "]": "["}[token]:
                raise ValueError(f"pattern {pattern!r}: unbalanced {token!r}")
        elif "a" <= token[0] <= "z":
            axes.append(Axis(token[0], "[" in opened, len(token) > 1, "(" in opened))
        else:
            raise ValueError(f"pattern {pattern!r}: unexpected {token!r}")
    if opened:
        raise ValueError(f"pattern {pattern!r}: unbalanced {opened[-1]!r}")
    names, inside = [axis.name for axis in axes], [axis for axis in axes if axis.inside]
    if len(set(names)) < len(names):
        raise ValueError(f"pattern {pattern!r}: a name stands for one axis and occurs once")
    if sum(axis.many and axis.name != "c" for axis in axes) > 1:
        raise ValueError(f"pattern {pattern!r}: only one name besides 'c' can stand for any number of axes")
    if inside and (len(inside) != 2 or inside[0].name != "g" or any(axis.many for axis in inside)):
        raise ValueError(f"pattern {pattern!r}: parentheses hold 'g' and one other name, as in '(g c)'")
    return tuple(axes)


@lru_cache(maxsize=4096)
def solve(pattern: str, shape: tuple[int, ...], *, groups: int = 1, trailing: int = 1) -> Layout:
    """Lay a pattern over a shape.

    Args:
        pattern: as in :class:`normkit.vocabulary.spec.Spec`.
        shape: of the tensor.
        groups: the size of ``g`` inside parentheses.
        trailing: how many axes ``c...`` covers (the length of a layer norm's ``normalized_shape``).

    Raises:
        ValueError: the shape does not fit the pattern; the message has the numbers.
    """
    axes = parse(pattern)
    fixed = sum(not axis.many and not axis.inside for axis in axes) + any(axis.inside for axis in axes)
    fixed += sum(trailing for axis in axes if axis.many and axis.name == "c")
    free = len(shape) - fixed
    if free < 0:
        raise ValueError(f'pattern "{pattern}" needs at least {fixed} axes, the shape {shape} has {len(shape)}')
    view: list[int] = []
    pooled: list[int] = []
    weighted: list[int] = []
    position = 0
    for axis in axes:
        if axis.inside:
            channels = shape[position]
            if groups < 1 or channels % groups:
                raise ValueError(f"{channels} channels do not divide into {groups} groups")
            sizes: tuple[int, ...] = (groups,) if axis.name == "g" else (channels // groups,)
            position += axis.name != "g"
        else:
            width = 1 if not axis.many else trailing if axis.name == "c" else free
            sizes = shape[position : position + width]
            position += width
        for size in sizes:
            if axis.pooled:
                pooled.append(len(view))
            if axis.name in _WEIGHTED:
                weighted.append(len(view))
            view.append(size)
    if position != len(shape):
        raise ValueError(f'pattern "{pattern}" covers {position} axes, the shape {shape} has {len(shape)}')
    return Layout(tuple(view), tuple(pooled), tuple(weighted))


def roles(pattern: str, axes: int, trailing: int = 1) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """What the axes of any tensor with so many axes are for, whatever their sizes.

    Returns:
        The pooled axes and the weighted ones, counted with the parentheses opened; then the axes of the tensor itself
        along which a sample may be padded: neither the samples' nor the channels'.

    >>> roles("n (g [c]) [s...]", 4)
    ((2, 3, 4), (1, 2), (2, 3))
    """
    try:
        layout = solve(pattern, (1,) * axes, trailing=trailing)
    except ValueError:
        raise ValueError(f'pattern "{pattern}" needs more axes than the {axes} of the input') from None
    opened = len(layout.view) - axes
    others = (axis for axis in range(1, len(layout.view)) if axis not in layout.weighted)
    padded = tuple(axis - opened if axis > layout.weighted[0] else axis for axis in others)
    return layout.pooled, layout.weighted, padded


# What torch.compiler.assume_constant_result does, which would load the compiler: regular expressions cannot be traced.
roles._dynamo_marked_constant = True  # type: ignore[attr-defined]
