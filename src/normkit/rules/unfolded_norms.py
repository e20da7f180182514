"""Batch norms in evaluation that the layer before them could take over."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.rules.wording import several, where
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding
from normkit.vocabulary.prescription import Prescription


def find(evidence: Evidence) -> Iterator[Finding]:
    places = [
        module
        for module in evidence.modules("foldable_into")
        if evidence.number("in_training", module) == 0 and evidence.number("keeps_statistics", module)
    ]
    if not places or evidence.number("model_training"):
        return
    yield Finding(
        RULE.name,
        "note",
        f"{several(len(places), 'batch norm')} could be folded into the layer before ({where(places)}): in evaluation "
        "each is a scale and a shift",
        tuple(places),
        "foldable_into",
        float(len(places)),
        0.0,
        "for deployment",
        prescriptions=(
            Prescription(
                "batch norms are folded",
                "",
                "the same outputs with fewer passes over memory",
                "eval_identical",
                by_hand="model = nk.fold(model, example_inputs)",
            ),
        ),
        check="nk.fold certifies the greatest error",
    )


RULE = Rule(
    "unfolded_norms",
    frozenset({"foldable_into", "in_training"}),
    "A model in evaluation with batch norms directly after a convolution or a linear layer.",
    "By running statistics the norm is a fixed scale and shift per channel, which the weights before can hold.",
    "The model is evaluated between epochs and goes on training.",
    ("https://github.com/pytorch/ao/issues/4758", "docs/fold.md"),
    find,
)
