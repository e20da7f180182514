"""Batch norms whose weight and bias are frozen, while their running statistics go on moving."""

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
        for module, still in evidence.numbers("affine_frozen")
        if still
        and evidence.number("in_training", module)
        and evidence.number("keeps_statistics", module)
        and not evidence.number("frozen", module)
    ]
    if not places:
        return
    yield Finding(
        RULE.name,
        "error",
        f"{several(len(places), 'batch norm', 'is', 'are')} frozen by half ({where(places)}): weight and bias get no "
        "gradients, but the layer is in training mode, normalises by the batch and moves its running statistics",
        tuple(places),
        "in_training",
        1.0,
        0.0,
        "a frozen layer computes the same at every step",
        prescriptions=tuple(
            Prescription(
                "running statistics are frozen as well",
                place,
                "model.train() then leaves the layer as it is",
                "eval_identical",
                operation="freeze_",
            )
            for place in places
        ),
        check="buffers before and after one step are equal",
    )


RULE = Rule(
    "frozen_but_training",
    frozenset({"affine_frozen", "in_training", "keeps_statistics"}),
    "A batch norm with requires_grad=False on weight and bias, in training mode.",
    "requires_grad=False stops the optimizer and nothing else; model.train() turns the layer back to batch statistics, "
    "and the statistics of the pretrained network are overwritten by those of a small new data set.",
    "Where only gamma and beta are meant to stand still while the statistics adapt to a new domain.",
    (
        "https://github.com/pgniewko/gt-pyg/issues/112",
        "https://github.com/poppinace/indexnet_matting/issues/35",
        "https://github.com/jfzhang95/pytorch-deeplab-xception/issues/140",
        "https://github.com/Lightning-AI/pytorch-lightning/issues/15063",
    ),
    find,
)
