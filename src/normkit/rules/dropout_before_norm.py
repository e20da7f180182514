"""Dropout upstream of a batch norm: the variance in training is not the one in evaluation."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.rules.wording import several, where
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding
from normkit.vocabulary.prescription import Prescription

SHIFT = 0.1


def find(evidence: Evidence) -> Iterator[Finding]:
    shifts = {module: shift for module, shift in evidence.numbers("dropout_variance_shift") if shift > SHIFT}
    if not shifts:
        return
    worst = max(shifts, key=lambda module: shifts[module])
    places = (worst, *(module for module in shifts if module != worst))
    dropout = evidence.word("dropout_before", worst)
    yield Finding(
        RULE.name,
        "warning",
        f"dropout ({dropout}) changes the variance that {several(len(shifts), 'batch norm', 'reads', 'read')} by "
        f"{2.718281828 ** shifts[worst] - 1:.0%} in training ({where(places)}): the running variance is wrong in "
        "evaluation",
        places,
        "dropout_variance_shift",
        shifts[worst],
        SHIFT,
        "a tenth of the variance; Li et al. 2019",
        prescriptions=(
            Prescription(
                "dropout goes behind the last batch norm",
                dropout,
                "variances are then the same in both modes",
                "retrain",
                by_hand="torch.nn.Sequential(*layers_with_batch_norm, torch.nn.Dropout(p), torch.nn.Linear(...))",
                arms="batch,batch+dropout:0.2",
            ),
            Prescription(
                "running statistics are estimated without dropout",
                "",
                "calibration runs dropout in evaluation mode",
                "train_identical",
                operation="calibrate_",
            ),
        ),
        check="nk.diagnose(model, batch, select='dropout_before_norm')",
    )


RULE = Rule(
    "dropout_before_norm",
    frozenset({"dropout_variance_shift"}),
    "A dropout before a batch norm, with no other batch norm between, that changes the variance by more than a tenth.",
    "Dropout multiplies what it keeps by 1 / (1 - p), which keeps the mean and raises the variance. The running "
    "variance "
    "is that of training; in evaluation dropout is off and every channel comes out too small.",
    "A small p, or so many values that the sum hardly notices: what is reported was measured on this batch.",
    ("Li et al. 2019, arXiv:1801.05134",),
    find,
)
