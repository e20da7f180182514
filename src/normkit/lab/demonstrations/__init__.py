"""Demonstrations: what a norm does, shown; without arms, rates or seeds, so that nothing here is a comparison."""

from __future__ import annotations

DEMONSTRATIONS = {"style": "normkit.lab.demonstrations.style:style"}
"""By the name that `normkit compare` takes: a function of a directory that fills it and returns its summary."""
