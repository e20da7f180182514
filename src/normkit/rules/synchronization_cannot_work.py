"""Synchronised batch norm that has nothing to synchronise with, or that torch refuses."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.rules.wording import several, where
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding, Severity
from normkit.vocabulary.prescription import Prescription

TORCHS = "torch.nn.modules.batchnorm.SyncBatchNorm"


def find(evidence: Evidence) -> Iterator[Finding]:
    synchronized = [module for module, yes in evidence.numbers("synchronized") if yes]
    refused = [
        module
        for module in synchronized
        if evidence.word("class_name", module) == TORCHS
        and evidence.word("device", module) == "cpu"
        and evidence.number("in_training", module)
        and (evidence.number("processes") or 0) > 1
    ]
    if refused:
        yield _finding(
            "error",
            f"{several(len(refused), 'SyncBatchNorm')} on a CPU ({where(refused)}): torch's raises there",
            refused,
            Prescription(
                "normkit's synchronised batch norm",
                "",
                "it runs on CPUs, over gloo",
                "eval_identical",
                operation="sync_",
            ),
        )
    elif synchronized and (evidence.number("processes") or 0) < 2:
        processes = evidence.number("processes") or 0
        why = "torch.distributed is not initialised" if not processes else "there is one process"
        yield _finding(
            "note",
            f"{several(len(synchronized), 'synchronised batch norm', 'has', 'have')} nobody to synchronise with "
            f"({where(synchronized)}): {why}",
            synchronized,
            _unsynchronized(evidence, synchronized),
        )


def _unsynchronized(evidence: Evidence, places: list[str]) -> Prescription:
    what, why = "plain batch norm", "a saved or exported model needs no processes"
    if any(evidence.word("class_name", place) == TORCHS for place in places):
        return Prescription(
            what, "", why, "eval_identical", by_hand="# load the weights into the model as it was before conversion"
        )
    return Prescription(what, "", why, "eval_identical", operation="unsync_")


def _finding(severity: Severity, claim: str, places: list[str], prescription: Prescription) -> Finding:
    return Finding(
        RULE.name,
        severity,
        claim,
        tuple(places),
        "processes",
        0.0 if severity == "note" else 2.0,
        2.0,
        "statistics of several processes",
        prescriptions=(prescription,),
        check="torch.distributed.get_world_size()",
    )


RULE = Rule(
    "synchronization_cannot_work",
    frozenset({"synchronized", "processes"}),
    "A synchronised batch norm without a second process, or torch's on a CPU.",
    "torch's SyncBatchNorm raises on CPUs in training; without processes it costs a look-up at every call, and an "
    "exported or folded model carries a layer that runtimes do not know.",
    "The model is built first and the processes are started later.",
    (
        "https://github.com/open-mmlab/mmocr/issues/398",
        "https://github.com/pytorch/pytorch/issues/44957",
        "https://github.com/pytorch/pytorch/issues/75252",
    ),
    find,
)
