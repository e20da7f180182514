"""Words that the claims of rules share."""

from __future__ import annotations

from collections.abc import Sequence

KINDS = {"batch_norm": "batch norm", "group_norm": "group norm", "instance_norm": "instance norm"}


def several(number: int, word: str, verb: str = "", verb_many: str = "") -> str:
    """``1 layer keeps``, ``3 layers keep``."""
    if number == 1:
        return f"1 {word} {verb}".rstrip()
    return f"{number} {word}s {verb_many}".rstrip()


def where(names: Sequence[str], first: int = 1) -> str:
    """``layer1.bn1`` or ``layer1.bn1 and 3 more``."""
    shown = ", ".join(name or "the model" for name in names[:first])
    more = len(names) - first
    return f"{shown} and {more} more" if more > 0 else shown
