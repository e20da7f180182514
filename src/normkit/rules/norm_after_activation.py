"""A norm behind an activation that has let units die."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.rules.wording import several, where
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding
from normkit.vocabulary.prescription import Prescription

SHARE = 0.25


def find(evidence: Evidence) -> Iterator[Finding]:
    dead = {}
    for module in evidence.modules("activation_before"):
        share = evidence.number("dead_share", evidence.word("activation_before", module))
        if share is not None and share > SHARE:
            dead[module] = share
    if not dead:
        return
    worst = max(dead, key=lambda module: dead[module])
    places = (worst, *(module for module in dead if module != worst))
    activation = evidence.word("activation_before", worst)
    yield Finding(
        RULE.name,
        "warning",
        f"{several(len(dead), 'norm', 'stands', 'stand')} behind an activation with {dead[worst]:.0%} dead units "
        f"({where(places)}, after {activation}): it cannot bring them back",
        places,
        "dead_share",
        dead[worst],
        SHARE,
        "a quarter of the units",
        prescriptions=(
            Prescription(
                "the norm goes before the activation",
                worst,
                "each unit is then above 0 for about half of the batch",
                "retrain",
                by_hand="torch.nn.Sequential(torch.nn.Conv2d(..., bias=False), nk.BatchNorm2d(width, "
                "activation='relu'))",
                arms="batch,batch+placement:after",
            ),
        ),
        check="nk.diagnose(model, batch, select='norm_after_activation')",
    )


RULE = Rule(
    "norm_after_activation",
    frozenset({"activation_before", "dead_share"}),
    "A norm directly after an activation of which more than a quarter of the units are dead.",
    "Before the activation a norm keeps every unit alive; behind it, a unit that is 0 everywhere stays 0, and the norm "
    "divides its variance of 0 by eps.",
    "Where all units live, the order after is as good; then nothing is reported.",
    ("Ioffe & Szegedy 2015, arXiv:1502.03167, section 3.2",),
    find,
)
