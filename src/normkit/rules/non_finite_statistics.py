"""Running statistics that are NaN, infinite, or a variance below 0: training looks fine, evaluation is NaN."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.rules.wording import several, where
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding
from normkit.vocabulary.prescription import Prescription


def find(evidence: Evidence) -> Iterator[Finding]:
    bad = {name: count for name, count in evidence.numbers("running_nonfinite") if count > 0}
    below = [name for name, least in evidence.numbers("least_running_variance") if least < 0]
    places = [*bad, *(name for name in below if name not in bad)]
    if not places:
        return
    step = _since(evidence, places[0])
    when = "" if step is None else f" since step {step}"
    what = "NaN or infinity" if bad else "a variance below 0"
    yield Finding(
        RULE.name,
        "error",
        f"the running statistics of {several(len(places), 'norm')} hold {what}{when} ({where(places)}): "
        "training does not show it, evaluation does",
        tuple(places),
        "running_nonfinite" if bad else "least_running_variance",
        max(bad.values()) if bad else min(value for _, value in evidence.numbers("least_running_variance")),
        0.0,
        "statistics of finite data are finite",
        step,
        (
            Prescription(
                "running statistics are estimated anew",
                "",
                "an average that a NaN has entered never leaves it",
                "train_identical",
                operation="calibrate_",
            ),
            Prescription(
                "a bad batch no longer enters them",
                "",
                "normkit's batch norm leaves its statistics alone when a batch is not finite",
                "identical",
                operation="accelerate_",
            ),
        ),
        "all(buffer.isfinite().all() for buffer in model.buffers())",
    )


def _since(evidence: Evidence, module: str) -> int | None:
    values = evidence.series("running_nonfinite", module)
    return next((reading.step for reading in values if isinstance(reading.value, float) and reading.value > 0), None)


RULE = Rule(
    "non_finite_statistics",
    frozenset({"running_nonfinite"}),
    "running_mean or running_var with a value that is NaN or infinite, or a negative variance.",
    "A single batch with an infinite activation poisons the moving average for good. Training normalises by the batch "
    "and goes on as before; the first evaluation gives NaN, or a checkpoint that was saved is useless.",
    "None.",
    (
        "https://github.com/pytorch/pytorch/issues/1206",
        "https://github.com/pytorch/pytorch/issues/10008",
        "https://github.com/open-edge-platform/anomalib/issues/2965",
    ),
    find,
    after_nan=True,
)
