"""Parameters that are NaN or infinite."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.rules.wording import several, where
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding
from normkit.vocabulary.prescription import Prescription


def find(evidence: Evidence) -> Iterator[Finding]:
    bad = dict(evidence.numbers("parameter_nonfinite"))
    bad = {name: count for name, count in bad.items() if count > 0}
    if not bad:
        return
    first = next(iter(bad))
    step = evidence.series("parameter_nonfinite", first)[0].step
    when = "" if step is None else f" since step {step}"
    yield Finding(
        RULE.name,
        "error",
        f"{several(len(bad), 'parameter', 'holds', 'hold')} NaN or infinity{when} ({where([*bad])}): whatever they "
        "touch is lost",
        tuple(bad),
        "parameter_nonfinite",
        max(bad.values()),
        0.0,
        "a number is finite",
        step,
        (
            Prescription(
                "training goes back to the last checkpoint that is finite",
                "",
                "a NaN never becomes a number again",
                "retrain",
                by_hand="model.load_state_dict(torch.load('last_good.pt'))  # then a smaller learning rate, or\n"
                "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)",
            ),
        ),
        "all(p.isfinite().all() for p in model.parameters())",
    )


RULE = Rule(
    "non_finite_parameters",
    frozenset({"parameter_nonfinite"}),
    "A parameter with a value that is NaN or infinite.",
    "One step with a gradient that was not finite is enough; from then on every output is NaN.",
    "None.",
    ("https://github.com/pytorch/pytorch/issues/1206", "https://github.com/open-edge-platform/anomalib/issues/2965"),
    find,
    after_nan=True,
)
