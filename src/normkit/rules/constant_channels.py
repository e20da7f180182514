"""Channels without variance: the norm divides by the root of eps and amplifies rounding noise."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.rules.wording import several, where
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding
from normkit.vocabulary.prescription import Prescription

SHARE = 0.25


def find(evidence: Evidence) -> Iterator[Finding]:
    shares = {
        module: share
        for module, share in evidence.numbers("constant_share")
        if share > 0 and (evidence.number("values_per_channel", module) or 0) > 2
    }
    if not shares:
        return
    worst = max(shares, key=lambda module: shares[module])
    eps = evidence.number("eps", worst)
    places = (worst, *(module for module in shares if module != worst))
    yield Finding(
        RULE.name,
        "warning" if shares[worst] > SHARE else "note",
        f"in {several(len(shares), 'norm')} up to {shares[worst]:.0%} of the channels vary less than eps "
        f"({where(places)}{'' if eps is None else f', eps {eps:g}'}): what little differs is not normalised",
        places,
        "constant_share",
        shares[worst],
        SHARE,
        "a quarter of the channels",
        prescriptions=(
            Prescription(
                "whatever feeds constant channels",
                worst,
                "dead units, a constant input, or a scale at which eps counts",
                "retrain",
                by_hand="# look at what comes before: inputs that were scaled twice, dead units, a padded channel;\n"
                "# inputs of standard deviation 1 make eps small beside every variance",
            ),
        ),
        check="nk.diagnose(model, batch, select='constant_channels')",
    )


RULE = Rule(
    "constant_channels",
    frozenset({"constant_share"}),
    "Units of a norm whose variance over a batch is below eps.",
    "eps is added so that nothing is divided by 0. Where the variance is smaller, eps decides the scale, and a norm "
    "of inputs that are all small (pixels divided by 255 twice) hardly normalises.",
    "Borders of images, one-hot columns that a batch does not have, channels that were pruned.",
    ("Ioffe & Szegedy 2015, arXiv:1502.03167",),
    find,
)
