"""Running statistics that still are, or still hold much of, the 0 and 1 that they started with."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.rules.wording import START, loses, several, where
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding, Severity
from normkit.vocabulary.prescription import Prescription

SHARE = START
MOSTLY = 0.5
"""From which on it is the cause of what evaluation loses, and not a part of it."""
DRIFT = 0.25
"""Deviations, or nats of the variance, from which on a batch confirms it."""


def find(evidence: Evidence) -> Iterator[Finding]:
    evaluating = [
        module
        for module, keeps in evidence.numbers("keeps_statistics")
        if keeps and evidence.number("in_training", module) == 0 and not evidence.number("frozen", module)
    ]
    never = [module for module in evaluating if evidence.number("statistics_at_start", module)]
    if never and not evidence.number("model_training"):
        yield _finding(
            "error",
            f"{several(len(never), 'batch norm', 'is', 'are')} in evaluation with running statistics that nobody has "
            f"estimated ({where(never)}): mean 0 and variance 1 in every channel, so that nothing is normalised",
            never,
            1.0,
        )
        return
    shares = {module: evidence.number("start_share", module) or 0.0 for module in evaluating}
    places = [module for module, share in shares.items() if share > SHARE and _off(evidence, module) is not False]
    if places:
        measured = any(_off(evidence, module) for module in places)
        most = max(shares.values())
        seen = evidence.number("batches_seen", places[0])
        yield _finding(
            ("error" if most > MOSTLY and loses(evidence) else "warning") if measured else "note",
            f"the running statistics of {several(len(places), 'batch norm')} are {most:.0%} the 0 and 1 that they "
            f"started with ({where(places)}): they have seen {seen or 0:.0f} batch{'' if seen == 1 else 'es'}",
            places,
            most,
        )


def _off(evidence: Evidence, module: str) -> bool | None:
    """Whether a batch confirms it: after a calibration on few batches the count alone would mislead."""
    drifts = [evidence.number(name, module) for name in ("mean_drift", "variance_drift")]
    known = [drift for drift in drifts if drift is not None]
    return max(known) > DRIFT if known else None


def _finding(severity: Severity, claim: str, places: list[str], share: float) -> Finding:
    return Finding(
        RULE.name,
        severity,
        claim,
        tuple(places),
        "start_share",
        share,
        SHARE,
        "the share of the start after 29 batches at momentum 0.1",
        prescriptions=(
            Prescription(
                "running statistics are estimated",
                "",
                "an average over real batches, with nothing of the start in it",
                "train_identical",
                operation="calibrate_",
            ),
        ),
        check="nk.diagnose(model, batch, loss_fn) again: loss_running against loss_batch_statistics",
    )


RULE = Rule(
    "statistics_hold_their_start",
    frozenset({"keeps_statistics", "in_training"}),
    "A model in evaluation whose running statistics have seen no batch, or few for their momentum.",
    "After n batches (1 - momentum)^n of the average is still the 0 and 1 it began with. Evaluation after a few steps, "
    "a small momentum, or a converted model without statistics gives outputs of another scale than training.",
    "A model that was put into evaluation before training (a smoke test). Without a batch only the count is known, and "
    "statistics that were estimated on few batches at once are as good as any: it is then a note.",
    ("https://github.com/chemprop/chemprop/issues/607", "https://github.com/pytorch/pytorch/issues/4741"),
    find,
)
