"""Policies by the names that people type: ``"ghost:16"``, ``"renorm:3:5:100"``."""

from __future__ import annotations

import difflib
import inspect
import re
from typing import Any

from normkit.statistics.policy import Policy


def policies() -> dict[str, type[Policy]]:
    """Every policy of the menu by its name in small letters: ``moving_average`` -> MovingAverage."""
    from normkit import statistics

    members = [getattr(statistics, name) for name in statistics.__all__]
    kinds = [kind for kind in members if isinstance(kind, type) and issubclass(kind, Policy) and kind is not Policy]
    return {_small(kind.__name__): kind for kind in kinds}


def named(text: str) -> Policy:
    """The policy of a name, and of its arguments in order behind colons.

    >>> from normkit.statistics import named
    >>> named("ghost:16")
    Ghost(size=16)

    Raises:
        ValueError: no policy has that name, or it does not take these arguments; the message says which it takes.
    """
    name, *values = text.split(":")
    known = policies()
    kind = next((own for key, own in known.items() if _plain(key) == _plain(name)), None)
    if kind is None:
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        suggestion = f"  did you mean {near[0]!r}?\n" if near else ""
        raise ValueError(f"there is no policy named {name!r}.\n{suggestion}  choose from: {', '.join(sorted(known))}")
    takes = ", ".join(inspect.signature(kind).parameters)
    try:
        return kind(*map(_value, values))
    except TypeError:
        raise ValueError(f"statistics={text!r}: {kind.__name__} takes ({takes}), in this order behind colons") from None


def _small(name: str) -> str:
    """``MovingAverage`` -> ``moving_average``."""
    parts = [f"_{sign.lower()}" if sign.isupper() and place else sign.lower() for place, sign in enumerate(name)]
    return "".join(parts)


def _plain(name: str) -> str:
    """As names are compared: case, hyphens and underscores do not matter."""
    return re.sub(r"[\s_\-]", "", name.lower())


def _value(word: str) -> Any:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word
