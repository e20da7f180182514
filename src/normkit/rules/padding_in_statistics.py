"""Padding that is pooled with the data."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.rules.wording import several, where
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding
from normkit.vocabulary.prescription import Prescription

SHARE = 0.1


def find(evidence: Evidence) -> Iterator[Finding]:
    padded = {module: share for module, share in evidence.numbers("padding_share") if share > SHARE}
    if not padded:
        return
    worst = max(padded, key=lambda module: padded[module])
    places = (worst, *(module for module in padded if module != worst))
    kind = evidence.word("kind", worst).replace("_", " ")
    yield Finding(
        RULE.name,
        "warning",
        f"{padded[worst]:.0%} of the positions that {several(len(padded), kind, 'pools', 'pool')} repeat the end of "
        "their "
        f"sample ({where(places)}): padding is in mean and variance",
        places,
        "padding_share",
        padded[worst],
        SHARE,
        "a tenth of the positions",
        prescriptions=(
            Prescription(
                "the norm leaves padding out",
                worst,
                "mean and variance are those of the data",
                "retrain",
                by_hand="y = norm(x, mask=lengths)  # nk.BatchNorm1d and the other pooled norms of normkit, "
                "docs/masks.md",
                arms="batch,layer",
            ),
        ),
        check="a sample gives the same alone and beside a longer one",
    )


RULE = Rule(
    "padding_in_statistics",
    frozenset({"padding_share"}),
    "A batch, instance or group norm over sequences of unequal length, of which more than a tenth is padding.",
    "A mean over data and padding depends on how much was padded: on the longest sample of the batch, or on the other "
    "samples. The same sequence gives other outputs in another batch.",
    "Sequences that really end in a constant.",
    (
        "docs/masks.md",
        "https://github.com/pytorch/pytorch/issues/70529",
        "https://github.com/pytorch/pytorch/issues/81985",
    ),
    find,
)
