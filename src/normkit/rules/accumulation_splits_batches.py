"""Gradient accumulation with batch norm: the statistics are those of the small batches."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.rules.wording import several, typical, where
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding
from normkit.vocabulary.prescription import Prescription


def find(evidence: Evidence) -> Iterator[Finding]:
    counted = "backward_passes" if "backward_passes" in evidence else "forward_passes"
    passes = typical(evidence, counted)
    norms = [
        module
        for module in evidence.modules("kind")
        if evidence.word("kind", module) == "batch_norm"
        and evidence.number("in_training", module) != 0
        and not evidence.number("frozen", module)
        and not evidence.number("accumulates", module)
    ]
    if passes is None or passes < 2 or not norms:
        return
    yield Finding(
        RULE.name,
        "warning",
        f"{passes:.0f} batches go into one step, and {several(len(norms), 'batch norm', 'normalises', 'normalise')} "
        f"each of them alone ({where(norms)}): accumulation does not enlarge the batch that they see",
        tuple(norms),
        counted,
        passes,
        1.0,
        "one pass per step",
        prescriptions=(
            Prescription(
                "running statistics move once per step, by all of its batches",
                "",
                "evaluation then sees statistics of the whole batch",
                "train_identical",
                by_hand="with nk.accumulate_statistics(model):  # around the batches of one step, "
                "docs/accumulation-and-"
                "freezing.md\n    ...",
            ),
            Prescription(
                "batch norm becomes group norm",
                "",
                "group norm does not care how a batch was cut",
                "retrain",
                operation="convert_",
                options=(("to", "group:auto"),),
            ),
        ),
        check="nk.diagnose(model, small_batch): batch_noise",
    )


RULE = Rule(
    "accumulation_splits_batches",
    frozenset({"forward_passes", "kind"}),
    "More than one backward pass per optimizer step in a model with batch norm.",
    "Accumulated gradients are those of a large batch in every layer but batch norm: it has normalised each part by "
    "itself, and its running statistics have moved once per part.",
    "Parts that are large enough by themselves (see few_values_per_channel); several losses on one batch; where only "
    "forward passes were counted, a second pass that is no part of the step (see statistics_move_twice).",
    ("https://github.com/ultralytics/yolov5/issues/1630", "https://github.com/open-mmlab/mmcv/issues/1869"),
    find,
)
