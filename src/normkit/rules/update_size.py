"""Steps that are far too large or too small for the weights they change."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.rules.wording import several, typical, where
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding
from normkit.vocabulary.prescription import Prescription

LARGE, SMALL = 0.03, 3e-6
"""A factor of 30 above, and of 300 below, the thousandth that is usual."""

READINGS = 3
"""Samples from which on the median is one: the first steps of a run are large."""


def find(evidence: Evidence) -> Iterator[Finding]:
    ratios = {name: typical(evidence, "update_to_weight", name) for name in evidence.modules("update_to_weight")}
    long = {name for name in ratios if len(evidence.series("update_to_weight", name)) >= READINGS}
    known = {name: ratio for name, ratio in ratios.items() if ratio is not None and name in long}
    large = {name: ratio for name, ratio in known.items() if ratio > LARGE}
    small = {name: ratio for name, ratio in known.items() if 0 <= ratio < SMALL}
    if large:
        worst = max(large, key=lambda name: large[name])
        yield _finding(
            f"a step changes {several(len(large), 'parameter')} by up to {large[worst]:.2g} of its size "
            f"({where(sorted(large, key=lambda name: -large[name]))}): the learning rate is too large by a factor "
            "of about "
            f"{large[worst] / 1e-3:.0f}",
            tuple(sorted(large, key=lambda name: -large[name])),
            large[worst],
            LARGE,
            "a smaller learning rate",
        )
    elif known and len(small) > len(known) / 2:
        worst = min(small, key=lambda name: small[name])
        yield _finding(
            f"a step changes {len(small)} of {len(known)} parameters by less than {SMALL:g} of their size "
            f"({where([worst])}: {small[worst]:.1g}): they do not move",
            tuple(small),
            small[worst],
            SMALL,
            "a larger learning rate",
        )


def _finding(claim: str, places: tuple[str, ...], ratio: float, limit: float, action: str) -> Finding:
    factor = 1e-3 / ratio if ratio else 100.0
    return Finding(
        RULE.name,
        "warning",
        claim,
        places,
        "update_to_weight",
        ratio,
        limit,
        "about 1e-3 is usual (Karpathy, lecture 4)",
        prescriptions=(
            Prescription(
                action,
                "",
                "about a thousandth of a weight per step",
                "retrain",
                by_hand=f"for group in optimizer.param_groups:\n    group['lr'] *= {factor:.2g}",
            ),
        ),
        check="nk.watch(...).diagnose(): update_to_weight near 1e-3",
    )


RULE = Rule(
    "update_size",
    frozenset({"update_to_weight"}),
    "||update|| / ||weight|| above 0.03, or below 3e-6 for most parameters.",
    "The ratio of a step to the weight it changes says whether a learning rate fits, whatever the optimizer. Weights "
    "before a norm grow under steps that are too large and so make them smaller by themselves.",
    "The first steps (warm-up), parameters that start at 0, the end of a schedule that goes to 0.",
    ("Karpathy, lecture 4: log10 update:data about -3",),
    find,
)
