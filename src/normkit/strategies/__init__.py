"""Strategies that change normalization by phase of training: one file each, plain data that reads and prescribes.

``with nk.strategies.attach(model, optimizer, nk.strategies.Freeze("25%"), total_steps=1000): ...`` puts one into any
training loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from normkit.strategies.coupling import Coupling
from normkit.strategies.fold import Fold
from normkit.strategies.freeze import Freeze
from normkit.strategies.ghost_ramp import GhostRamp
from normkit.strategies.handover import Handover
from normkit.strategies.progressive import Progressive
from normkit.strategies.recalibrate import Recalibrate
from normkit.strategies.renorm_ramp import RenormRamp
from normkit.strategies.select import Select
from normkit.strategies.strategy import Once, Phases, Ramp, Strategy
from normkit.strategies.taper import Taper
from normkit.strategies.text import is_phase, parse
from normkit.strategies.trigger import At, Measured, Moment, Plateau

if TYPE_CHECKING:
    from normkit.loop import Attached, attach

__all__ = [
    "At",
    "Attached",
    "Coupling",
    "Fold",
    "Freeze",
    "GhostRamp",
    "Handover",
    "Measured",
    "Moment",
    "Once",
    "Phases",
    "Plateau",
    "Progressive",
    "Ramp",
    "Recalibrate",
    "RenormRamp",
    "Select",
    "Strategy",
    "Taper",
    "attach",
    "is_phase",
    "parse",
]


def __getattr__(name: str) -> Any:
    """What carries strategies out is not theirs to import: :mod:`normkit.loop`, on first use."""
    if name not in ("attach", "Attached"):
        raise AttributeError(f"module 'normkit.strategies' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("normkit.loop"), name)
