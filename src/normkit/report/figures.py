"""Figures where matplotlib is installed, and a sentence in their place where it is not."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from normkit.report.document import Block, Figure, Text

NONE = 'No plot: matplotlib is not installed; type: pip install "normkit[lab]"'


def drawn(draw: Callable[[Any], Figure]) -> list[Block]:
    """The figure that ``draw`` makes of the plotting functions."""
    try:
        from normkit.report.plots import heat, over_steps
    except ModuleNotFoundError:
        return [Text(NONE, "note")]
    return [draw(SimpleNamespace(**{**vars(over_steps), **vars(heat)}))]
