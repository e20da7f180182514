"""Units that no sample of a batch switches on."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.rules.wording import several, where
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding
from normkit.vocabulary.prescription import Prescription

SHARE = 0.5


def find(evidence: Evidence) -> Iterator[Finding]:
    dead = {module: share for module, share in evidence.numbers("dead_share") if share > SHARE}
    if not dead:
        return
    worst = max(dead, key=lambda module: dead[module])
    places = (worst, *(module for module in dead if module != worst))
    yield Finding(
        RULE.name,
        "warning",
        f"{several(len(dead), 'activation', 'has', 'have')} up to {dead[worst]:.0%} dead units ({where(places)}): "
        "nothing in this batch switches them on, and no gradient passes",
        places,
        "dead_share",
        dead[worst],
        SHARE,
        "half of the units; over healthy models see docs/doctor.md",
        prescriptions=(
            Prescription(
                "a norm before the activation",
                worst,
                "about half of the values of every unit are then above 0",
                "retrain",
                by_hand="torch.nn.Sequential(torch.nn.Linear(..., bias=False), nk.BatchNorm1d(width, "
                "activation='relu'))"
                "\n# and a smaller learning rate: units die in large steps",
                arms="none,batch",
            ),
        ),
        check="nk.diagnose(model, batch, select='dead_activations')",
    )


RULE = Rule(
    "dead_activations",
    frozenset({"dead_share"}),
    "An activation like ReLU with more than half of its units at 0 for the whole batch.",
    "A unit that is below 0 for every sample gets no gradient and stays there. It starts with a step that was too "
    "large "
    "or with inputs that are all of one sign.",
    "A small batch, sparse features by design, many units in a wide layer.",
    (
        "https://github.com/keras-team/keras/issues/3425",
        "Karpathy, lecture 4: activations and gradients",
        "Lu et al. 2019, arXiv:1903.06733",
    ),
    find,
)
