"""Rules of diagnosis: one file each, pure functions from readings to findings. This is the menu.

The order is that in which equally severe findings are told: causes before their symptoms.
"""

from __future__ import annotations

from importlib import import_module

from normkit.rules.rule import Rule

MENU = (
    "no_running_statistics",
    "frozen_but_training",
    "half_precision_statistics",
    "optimizer_misses_parameters",
    "norm_parameters_decay",
)

RULES: dict[str, Rule] = {name: import_module(f"normkit.rules.{name}").RULE for name in MENU}
"""By name."""
