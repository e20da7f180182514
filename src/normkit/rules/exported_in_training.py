"""Batch norms of an exported program that normalise by the batch that they are asked about."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.rules.wording import several, where
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding
from normkit.vocabulary.prescription import Prescription


def find(evidence: Evidence) -> Iterator[Finding]:
    if not evidence.number("exported"):
        return
    training = [m for m, on in evidence.numbers("in_training") if on and evidence.word("kind", m) == "batch_norm"]
    if not training:
        return
    yield Finding(
        RULE.name,
        "error",
        f"{several(len(training), 'batch norm')} of the exported program {'is' if len(training) == 1 else 'are'} in "
        f"training mode ({where(training)}): what a sample gives depends on its batch, and every call moves the "
        "running statistics",
        tuple(training),
        "in_training",
        1.0,
        0.0,
        "a program that is served computes the same at every call",
        prescriptions=(
            Prescription(
                "the model is exported in evaluation mode",
                "",
                "a program keeps the modes that the model had; program.module().eval() does not change them",
                "retrain",
                by_hand="program = torch.export.export(model.eval(), example_inputs)",
            ),
        ),
        check="normkit doctor program.pt2 --select exported_in_training",
    )


RULE = Rule(
    "exported_in_training",
    frozenset({"exported", "in_training"}),
    "A program of torch.export with a batch norm that normalises by the batch.",
    "torch.export writes down what the model did, in the mode that it was in. A program that was exported in training "
    "gives other answers for other batches, refuses batches of one, and drifts with what it is asked.",
    "Programs that are trained further.",
    ("https://github.com/pytorch/pytorch/issues/75252", "https://github.com/pytorch/ao/issues/4758"),
    find,
)
