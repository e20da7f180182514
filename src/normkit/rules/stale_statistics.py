"""Running statistics that are not those of the data: after averaging, loading, pruning, or on other data."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.rules.wording import loses, losses, settled, several, where
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding
from normkit.vocabulary.prescription import Prescription

MEAN, VARIANCE = 0.5, 0.693
"""Deviations; nats: a factor of 2."""
NOISE = 3.0
"""Standard errors of a batch that count as luck."""
CONFIRMED = 0.25
"""Of both, where the loss is far worse by running statistics."""


def find(evidence: Evidence) -> Iterator[Finding]:
    drift = {
        module: value
        for module, value in evidence.numbers("mean_drift")
        if evidence.number("statistics_at_start", module) == 0
        and not _constant(evidence, module)
        and settled(evidence, module, "mean_drift")
    }
    hurts = loses(evidence)
    least = (CONFIRMED, CONFIRMED) if hurts else (MEAN, VARIANCE)
    far = {module: value for module, value in drift.items() if value > least[0] + NOISE * _noise(evidence, module)}
    wide = {
        module: value
        for module, value in evidence.numbers("variance_drift")
        if module in drift and value > least[1] + NOISE * (evidence.number("variance_noise", module) or 0.0)
    }
    places = sorted({*far, *wide}, key=lambda module: -max(far.get(module, 0.0), wide.get(module, 0.0)))
    if not places:
        return
    what = losses(evidence)
    by_mean = bool(far) and max(far.values()) >= max(wide.values(), default=0.0)
    how_far = f"by {max(far.values()):.2g} deviations" if by_mean else f"in variance by {_factor(max(wide.values()))}"
    yield Finding(
        RULE.name,
        "error" if hurts else "warning",
        f"the running statistics of {several(len(places), 'norm')} are not those of this batch ({where(places)}, "
        f"{how_far}){what}",
        tuple(places),
        "mean_drift" if by_mean else "variance_drift",
        max(far.values()) if by_mean else max(wide.values()),
        least[0] if by_mean else least[1],
        f"plus {NOISE:g} standard errors of the batch",
        prescriptions=(
            Prescription(
                "running statistics are estimated anew",
                "",
                "they belong to other weights or to other data" + ("" if hurts or not what else "; it may not help"),
                "train_identical",
                operation="calibrate_",
            ),
        ),
        check="nk.calibrate_(model, loader, keep_if=validate) keeps the old ones where those were better",
    )


def _constant(evidence: Evidence, module: str) -> bool:
    """Frozen, or in evaluation inside a model that trains: what it computes does not hang on the batch in any mode."""
    by_hand = evidence.number("in_training", module) == 0 and evidence.number("affine_frozen", module)
    return bool(evidence.number("frozen", module) or (by_hand and evidence.number("model_training")))


def _noise(evidence: Evidence, module: str) -> float:
    return evidence.number("batch_noise", module) or 0.0


def _factor(nats: float) -> str:
    return f"a factor of {2.718281828**nats:.2g}"


RULE = Rule(
    "stale_statistics",
    frozenset({"mean_drift", "variance_drift"}),
    "Running mean and variance far from those of a batch, beyond what the size of the batch explains.",
    "The statistics belong to other weights (EMA, SWA, pruning, a learning rate that is still large) or to other data. "
    "Training does not use them, evaluation uses nothing else.",
    "The batch is not like the training data, or too small to tell. Calibration does not always help: with a loss the "
    "report says whether it would on this batch.",
    (
        "https://github.com/Lightning-AI/pytorch-lightning/issues/14866",
        "https://github.com/huggingface/pytorch-image-models/issues/224",
        "Izmailov et al. 2018, arXiv:1803.05407",
    ),
    find,
)
