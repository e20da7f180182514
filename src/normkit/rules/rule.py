"""Rule: what a diagnosis rule is. A pure function of readings, with what a person needs to judge it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding


@dataclass(frozen=True, slots=True)
class Rule:
    """One file of this folder."""

    name: str
    """In words: ``few_values_per_channel``."""
    needs: frozenset[str]
    """Names of quantities; without every one of them the rule is not asked, and the report says so."""
    finds: str
    """One sentence: what is wrong where it fires."""
    means: str
    """Why that hurts, and how it shows."""
    false_alarms: str
    """When to leave it as it is."""
    references: tuple[str, ...]
    """Papers and issues that report the problem, and where the threshold comes from."""
    find: Callable[[Evidence], Iterable[Finding]]
    after_nan: bool = False
    """Whether what was read behind the first NaN is its business too. For all other rules that is a consequence."""
