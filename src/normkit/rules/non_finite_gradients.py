"""Gradients that are NaN or infinite."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.rules.wording import several, where
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding
from normkit.vocabulary.prescription import Prescription


def find(evidence: Evidence) -> Iterator[Finding]:
    bad = {name: count for name, count in evidence.numbers("gradient_nonfinite") if count > 0}
    if not bad:
        return
    steps = [
        reading.step for name in bad for reading in evidence.series("gradient_nonfinite", name) if _bad(reading.value)
    ]
    known = [step for step in steps if step is not None]
    when = f" at step {min(known)}" if known else ""
    yield Finding(
        RULE.name,
        "error",
        f"the gradients of {several(len(bad), 'parameter')} hold NaN or infinity{when} ({where([*bad])})",
        tuple(bad),
        "gradient_nonfinite",
        max(bad.values()),
        0.0,
        "a gradient is finite",
        min(known) if known else None,
        (
            Prescription(
                "the step is refused",
                "",
                "one such step makes every parameter NaN",
                "retrain",
                by_hand="torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)\n"
                "# in float16: torch.amp.GradScaler, which skips such steps; "
                "torch.autograd.set_detect_anomaly(True) names "
                "the operator",
            ),
        ),
        "nk.diagnose(model, batch, loss_fn, select='non_finite_gradients')",
    )


def _bad(value: object) -> bool:
    return isinstance(value, float) and value > 0


RULE = Rule(
    "non_finite_gradients",
    frozenset({"gradient_nonfinite"}),
    "A gradient with a value that is NaN or infinite.",
    "A root, a logarithm or a division at 0, an overflow in half precision, or a norm of a constant without eps.",
    "With a GradScaler the first steps overflow now and then by design; it skips them.",
    ("https://github.com/pytorch/pytorch/issues/10008", "transformers: debug='underflow_overflow'"),
    find,
    after_nan=True,
)
