"""The first value of a run that is not finite, by its step and its place."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding
from normkit.vocabulary.prescription import Prescription


def find(evidence: Evidence) -> Iterator[Finding]:
    for module in evidence.modules("first_nan")[:1]:
        first = evidence.series("first_nan", module)[0]
        yield Finding(
            RULE.name,
            "error",
            str(first.value),
            (module,) if module else (),
            "first_nan",
            step=first.step,
            prescriptions=(
                Prescription(
                    "see which operation it is",
                    module,
                    "anomaly mode names the line of the forward pass whose gradient is not finite first",
                    "identical",
                    by_hand="with torch.autograd.set_detect_anomaly(True):\n    loss_fn(model(x), y).backward()",
                ),
            ),
            check="the same run, watched again, has no first NaN",
        )


RULE = Rule(
    "first_nan",
    frozenset({"first_nan"}),
    "A gradient that was not finite for the first time, with the step, and where in the forward pass it comes from.",
    "Everything after it is its consequence: the loss, the weights, the statistics. So the other rules are asked about "
    "what was read before that step, and the frames on the page show what went through the layers at it.",
    "Steps that a GradScaler skips do not count: they change nothing.",
    ("https://github.com/pytorch/pytorch/issues/10008", "transformers: debug='underflow_overflow'"),
    find,
    after_nan=True,
)
