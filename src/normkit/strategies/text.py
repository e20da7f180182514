"""Strategies as text: ``batch@0-50% -> group:8@50% lr/10``."""

from __future__ import annotations

import re

from normkit.strategies.coupling import GRAMMAR as COUPLINGS
from normkit.strategies.coupling import parse as parse_coupling
from normkit.strategies.fold import Fold
from normkit.strategies.freeze import Freeze
from normkit.strategies.ghost_ramp import GhostRamp
from normkit.strategies.handover import Handover
from normkit.strategies.progressive import Progressive
from normkit.strategies.recalibrate import Recalibrate
from normkit.strategies.renorm_ramp import RenormRamp
from normkit.strategies.select import Select
from normkit.strategies.strategy import Phases, Strategy
from normkit.strategies.taper import Taper
from normkit.strategies.trigger import GRAMMAR as TRIGGERS

GRAMMAR = f"""\
phases, joined by ->, each a target, @ and when, then what happens to the step size:
  batch -> frozen@25% lr/10        batch@0-50% -> group:8@50%        taper@20%-60%        recalibrate/500
  targets: frozen, folded, a norm (group:8, layer, rms, none ...), taper, renorm, ghost:8-64, progressive, select
  when: {TRIGGERS}
  step size: {COUPLINGS}"""
_RAMPS = ("taper", "renorm", "ghost", "progressive")


def parse(text: str) -> Strategy:
    """The strategy that is written.

    >>> from normkit import strategies
    >>> (phase,) = strategies.parse("batch@0-50% -> group:8@50% lr/10").phases
    >>> phase.to, str(phase.at), phase.coupling.divide
    ('group:8', '50%', 10.0)

    Raises:
        ValueError: it cannot be read; the message says how it is written.
    """
    stages = [stage.strip() for stage in text.split("->")]
    first, *_ = stages
    if len(stages) > 1 and (re.fullmatch(r"[\w:.-]+(@0%?-\S+)?", first) and not is_phase(first)):
        stages = stages[1:]  # what the model has already
    try:
        return Phases(phases=tuple(_phase(stage) for stage in stages))
    except ValueError as error:
        raise ValueError(f"strategy {text!r}: {error}\n  a strategy is {GRAMMAR}") from None


def is_phase(stage: str) -> bool:
    """Whether the first stage of a text does something, and is not the name of what the model has already."""
    target = stage.partition("@")[0]
    if target.startswith("progressive:"):  # a norm with a schedule of its own
        return False
    return "/" in stage or target.partition(":")[0] in (*_RAMPS, "frozen", "folded", "select")


def _phase(stage: str) -> Strategy:
    if not stage:
        raise ValueError("there is an empty phase")
    head, *words = stage.split()
    if match := re.fullmatch(r"recalibrate/(\d+)", head):
        return Recalibrate(int(match[1]))
    target, at, when = head.rpartition("@")
    if not at:
        raise ValueError(f"{head!r} does not say when; write {head}@50%")
    coupling = parse_coupling(words)
    kind = target.partition(":")[0].lower()
    if kind in _RAMPS:
        return _ramp(kind, target, when, coupling)
    if kind in ("frozen", "freeze"):
        return Freeze(when, coupling=coupling)
    if kind in ("folded", "fold"):
        return Fold(when, coupling=coupling)
    if kind == "select":
        return Select(when, coupling=coupling)
    return Handover(when, target, coupling=coupling)


def _ramp(kind: str, target: str, when: str, coupling: object) -> Strategy:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%|ep)?-(\d+(?:\.\d+)?)(%|ep)?", when)
    if match is None:
        raise ValueError(f"{target}@{when}: a ramp runs between two points; write {target}@20%-60%")
    unit = match[4] or ""
    options: dict = {"start": f"{match[1]}{match[2] or unit}", "end": f"{match[3]}{unit}", "coupling": coupling}
    if kind == "ghost":
        sizes = re.fullmatch(r"ghost:(\d+)-(\d+)", target)
        if sizes is None:
            raise ValueError(f"{target!r}: a ghost ramp has two sizes; write ghost:8-64@0%-80%")
        return GhostRamp(sizes=(int(sizes[1]), int(sizes[2])), **options)
    if kind == "progressive":
        if target != kind:
            raise ValueError(f"{target!r}: the way is as long as the ramp; write progressive@{when}")
        return Progressive(**options)
    return Taper(**options) if kind == "taper" else RenormRamp(**options)
