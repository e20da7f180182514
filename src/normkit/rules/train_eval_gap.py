"""The same batch gives one output by batch statistics and another by running statistics."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.rules.wording import loses, losses, settled
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding
from normkit.vocabulary.prescription import Prescription

GAP = 0.5
"""Of the output; docs/doctor.md has healthy models."""
NOISE = 2.0
"""Times the standard error of a batch mean: deep networks add the luck of their layers up."""


def find(evidence: Evidence) -> Iterator[Finding]:
    gap = evidence.number("batch_statistics_gap")
    started = dict(evidence.numbers("statistics_at_start"))
    noise = max((value for _, value in evidence.numbers("batch_noise")), default=0.0)
    limit = GAP + NOISE * noise
    hurts = loses(evidence)
    if gap is None or not (gap > limit or hurts) or (started and all(started.values())):
        return
    if not all(settled(evidence, module, "batch_statistics_gap") for module in started):
        return
    yield Finding(
        RULE.name,
        "error" if hurts else "warning",
        f"by running statistics the outputs are others than by the statistics of the batch, by {gap:.2g} of their "
        f"size{losses(evidence)}",
        (),
        "batch_statistics_gap",
        gap,
        limit,
        f"half of the output, and {NOISE:g} standard errors of a batch mean",
        prescriptions=(
            Prescription(
                "running statistics are estimated anew",
                "",
                "the gap is theirs: all else was in evaluation both times",
                "train_identical",
                operation="calibrate_",
            ),
        ),
        check="nk.diagnose(model, batch, loss_fn): loss_training, loss_running, loss_batch_statistics",
    )


RULE = Rule(
    "train_eval_gap",
    frozenset({"batch_statistics_gap"}),
    "Outputs that depend on which statistics normalise, for one and the same batch.",
    "This is 'training looks fine, evaluation is garbage'. Dropout and the like are at rest in both passes, so the "
    "difference comes from batch norms alone: small batches, stale statistics, another distribution.",
    "A model that was never trained: its statistics are not those of anything yet.",
    (
        "https://github.com/pytorch/pytorch/issues/5406",
        "https://github.com/pytorch/pytorch/issues/4741",
        "https://github.com/pytorch/pytorch/issues/19916",
        "https://github.com/keras-team/keras/issues/6014",
    ),
    find,
)
