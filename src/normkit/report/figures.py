"""Figures where matplotlib is installed, and a sentence in their place where it is not."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from normkit.report.document import Block, Text

NONE = 'No plot: matplotlib is not installed; type: pip install "normkit[lab]"'


def drawn(where: str, *args: Any, **kwargs: Any) -> list[Block]:
    """The figure that a function of ``report.plots`` makes: ``drawn("heat.heat_map", ...)``."""
    module, _, function = where.partition(".")
    try:
        draw = getattr(import_module(f"normkit.report.plots.{module}"), function)
    except ModuleNotFoundError:
        return [Text(NONE, "note")]
    return [draw(*args, **kwargs)]
