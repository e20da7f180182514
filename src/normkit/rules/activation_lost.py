"""An activation that a converter has left behind: the child is there, and nobody calls it."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.rules.wording import several, where
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding
from normkit.vocabulary.prescription import Prescription


def find(evidence: Evidence) -> Iterator[Finding]:
    places = evidence.modules("leftover_activation")
    if not places:
        return
    kinds = ", ".join(sorted({evidence.word("leftover_activation", place) for place in places}))
    yield Finding(
        RULE.name,
        "error",
        f"{several(len(places), 'norm', 'has', 'have')} an activation that is never called ({where(places)}: {kinds}): "
        "a tool that knows torch's layers alone has rebuilt a layer with a fused activation",
        tuple(places),
        "leftover_activation",
        kinds,
        "",
        "torch's norms have no activation",
        prescriptions=(
            Prescription(
                "the conversion is done by normkit",
                "",
                "nk.sync_ and its kind know what a layer carries",
                "retrain",
                by_hand="# build the model again and load the weights, then\nnk.sync_(model)  # in place of "
                "torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)",
            ),
        ),
        check="the outputs before and after the conversion are equal",
    )


RULE = Rule(
    "activation_lost",
    frozenset({"kind"}),
    "A torch norm with a child named activation.",
    "convert_sync_batchnorm builds a layer out of the numbers of another one. An activation inside the layer stays as "
    "a child that the new forward does not call, so that the network has lost its non-linearity, in silence.",
    "A class of your own that subclasses torch's and calls the child itself is not reported: it is not torch's class.",
    (
        "docs/deviations.md",
        "https://github.com/huggingface/pytorch-image-models/issues/1254",
        "https://github.com/pytorch/pytorch/issues/187298",
    ),
    find,
)
