"""Batch norms without running statistics: in evaluation, what a sample gives depends on its neighbours."""

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
        for module, keeps in evidence.numbers("keeps_statistics")
        if not keeps and evidence.word("kind", module) == "batch_norm"
    ]
    if not places:
        return
    yield Finding(
        RULE.name,
        "warning",
        f"{several(len(places), 'batch norm', 'has', 'have')} no running statistics ({where(places)}): what a sample "
        "gives depends on the others in its batch",
        tuple(places),
        "keeps_statistics",
        0.0,
        1.0,
        "torch's default",
        prescriptions=(
            Prescription(
                "running statistics are kept and estimated",
                places[0],
                "evaluation then treats each sample alone",
                "train_identical",
                by_hand="# build the layer with track_running_stats=True, load the weights with strict=False, then\n"
                "nk.calibrate_(model, loader)",
            ),
        ),
        check="model.eval() gives the same for model(x)[:1] and model(x[:1])",
    )


RULE = Rule(
    "no_running_statistics",
    frozenset({"keeps_statistics"}),
    "A batch norm with track_running_stats=False.",
    "It normalises by the batch in evaluation too: a batch of one, an unusual mix of classes or another batch size "
    "give other predictions, and metrics that were computed on shuffled batches do not hold in use.",
    "Generators that are meant to see a whole batch, and networks that are only ever trained (teachers, probes).",
    ("https://github.com/openai/CLIP/issues/193", "https://github.com/xu-ji/IIC/issues/49"),
    find,
)
