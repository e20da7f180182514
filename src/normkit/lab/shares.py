"""Shares of a run in the name of a norm: `progressive:50%` is progressive:300 in a run of 600 steps."""

from __future__ import annotations

import re
from typing import TypeVar

Value = TypeVar("Value", str, float | str)
_SHARE = re.compile(r"(?<=:)(\d+(?:\.\d+)?)%")


def in_steps(value: Value, steps: int) -> Value:
    """A name with a number of steps in the place of each share of them; any share but 0 is one step at least.

    >>> in_steps("progressive:50%:10%", 600)
    'progressive:300:60'
    """
    if not isinstance(value, str):
        return value
    return _SHARE.sub(lambda found: str(max(round(steps * float(found[1]) / 100), int(float(found[1]) > 0))), value)
