"""Reading: one measured or read-off fact, and its place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reading:
    """What is known about one place of a model: a number, a word, or the names of neighbours."""

    quantity: str
    """What was read: the name that rules and tables use."""
    value: float | str | tuple[str, ...]
    module: str = ""
    """The module's name in the model; empty: the model itself."""
    step: int | None = None
    """The training step; ``None``: the model was not in training."""
    unit: str = ""
