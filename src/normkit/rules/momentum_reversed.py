"""A momentum from a framework that counts the other way round, or one that never moves anything."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.rules.wording import several, where
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding, Severity
from normkit.vocabulary.prescription import Prescription

LIMIT = 0.5


def find(evidence: Evidence) -> Iterator[Finding]:
    kept = [
        (module, momentum)
        for module, momentum in evidence.numbers("momentum")
        if evidence.number("keeps_statistics", module) and not evidence.number("frozen", module)
    ]
    never = [module for module, momentum in kept if momentum == 0]
    large = [(module, momentum) for module, momentum in kept if momentum >= LIMIT]
    if never:
        yield _finding(
            "error",
            f"{several(len(never), 'batch norm', 'has', 'have')} momentum 0 ({where(never)}): the running statistics "
            "never move; momentum=None is what averages over all batches",
            never,
            0.0,
            "momentum=None",
        )
    if large:
        places, most = [module for module, _ in large], max(momentum for _, momentum in large)
        yield _finding(
            "warning",
            f"{several(len(places), 'batch norm', 'has', 'have')} momentum {most:g} ({where(places)}): the running "
            f"statistics are {most:.1%} those of the last batch; torch counts the share of the new batch, others that "
            "of the old average",
            places,
            most,
            f"momentum={1 - most:.3g}",
        )


def _finding(severity: Severity, claim: str, places: list[str], value: float, word: str) -> Finding:
    return Finding(
        RULE.name,
        severity,
        claim,
        tuple(places),
        "momentum",
        value,
        LIMIT,
        "half of the average is the last batch",
        prescriptions=(
            Prescription(
                "momentum as torch counts it",
                "",
                "running statistics average over many batches",
                "train_identical",
                by_hand="for module in model.modules():\n"
                "    if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):\n"
                f"        module.{word.replace('=', ' = ')}",
            ),
            Prescription(
                "running statistics are estimated once, from many batches",
                "",
                "what evaluation uses no longer hangs on one batch",
                "train_identical",
                operation="calibrate_",
            ),
        ),
        check="nk.diagnose(model, select='momentum_reversed')",
    )


RULE = Rule(
    "momentum_reversed",
    frozenset({"momentum", "keeps_statistics"}),
    "A batch norm with a momentum of at least 0.5, or of 0.",
    "torch: new = (1 - momentum) * old + momentum * batch. Keras, TensorFlow and most papers mean the share of the old "
    "average: their 0.99 is 0.01 here. Ported as it is, evaluation uses the statistics of a single batch.",
    "momentum=1.0 while statistics are collected on purpose; a model that is only evaluated does not use it any more.",
    (
        "https://github.com/Lightning-AI/pytorch-lightning/issues/14866",
        "torch.nn.BatchNorm2d: the note on momentum",
        "https://github.com/pytorch/vision/issues/8250",
        "https://github.com/kazuto1011/deeplab-pytorch/issues/79",
    ),
    find,
)
