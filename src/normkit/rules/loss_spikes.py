"""A loss that jumps, or is no number."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding, Severity
from normkit.vocabulary.prescription import Prescription

SPIKE = 3.0
"""Times the median of the readings before."""
BEFORE = 5
"""Readings that make a level."""


def find(evidence: Evidence) -> Iterator[Finding]:
    losses = [(r.step, r.value) for r in evidence.series("loss") if isinstance(r.value, float)]
    lost = next((step for step, loss in losses if not math.isfinite(loss)), None)
    if any(not math.isfinite(loss) for _, loss in losses):
        yield _finding("error", f"the loss is not finite{_at(lost)}", float("nan"), lost)
        return
    spikes = []
    for place in range(BEFORE, len(losses)):
        level = statistics.median(loss for _, loss in losses[place - BEFORE : place])
        if level > 0 and losses[place][1] > SPIKE * level:
            spikes.append((losses[place][1] / level, losses[place][0]))
    if spikes:
        most, step = max(spikes)
        times = "once" if len(spikes) == 1 else f"{len(spikes)} times"
        yield _finding(
            "warning",
            f"the loss jumped {times}, to {most:.3g} times its level before{_at(step)} at the worst",
            most,
            step,
        )


def _at(step: int | None) -> str:
    return "" if step is None else f" at step {step}"


def _finding(severity: Severity, claim: str, measured: float, step: int | None) -> Finding:
    return Finding(
        RULE.name,
        severity,
        claim,
        (),
        "loss",
        measured,
        SPIKE,
        f"times the median of the {BEFORE} readings before",
        step,
        (
            Prescription(
                "gradients are clipped",
                "",
                "one bad batch then moves the weights no further than others do",
                "retrain",
                by_hand="torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # or nk.clip_grad_adaptive_(model)",
                arms="batch,batch+clip:0.02",
            ),
        ),
        "the curve of the next run",
    )


RULE = Rule(
    "loss_spikes",
    frozenset({"loss"}),
    "A loss above three times the median of the five readings before, or one that is not finite.",
    "Steps that are too large for the curvature: attention logits, a learning rate without warm-up, batches that are "
    "unlike the others. Batch norm then remembers the bad batch in its running statistics.",
    "Curricula and losses with several scales; a loss near 0 jumps by large factors and means nothing.",
    ("Wortsman et al. 2023, arXiv:2309.14322", "Cohen et al. 2021, arXiv:2103.00065"),
    find,
)
