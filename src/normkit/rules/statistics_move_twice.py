"""Running statistics that move more often than the optimizer steps and gradients are taken."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.rules.wording import several, typical, where
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding
from normkit.vocabulary.prescription import Prescription


def find(evidence: Evidence) -> Iterator[Finding]:
    passes = typical(evidence, "backward_passes") or typical(evidence, "forward_passes")
    expected = max(1.0, passes or 1.0)
    moves = {module: typical(evidence, "statistics_moves", module) for module in evidence.modules("statistics_moves")}
    often = {module: count for module, count in moves.items() if count is not None and count > expected}
    if not often:
        return
    most = max(often.values())
    places = tuple(sorted(often, key=lambda module: -often[module]))
    yield Finding(
        RULE.name,
        "warning",
        f"the running statistics of {several(len(often), 'norm')} move {most:.0f} times per step, where "
        f"{expected:.0f} would do ({where(places)}): something runs the model in training mode a second time",
        places,
        "statistics_moves",
        most,
        expected,
        "one per pass through the model",
        prescriptions=(
            Prescription(
                "the extra pass leaves statistics alone",
                "",
                "an average over steps weighs each batch once",
                "train_identical",
                by_hand="with nk.statistics_frozen(model):  # around the pass that is not the training step\n    ...\n"
                "nk.accelerate_(model)  # normkit's layers do not move in the second pass of activation checkpointing",
            ),
        ),
        check="model.get_submodule(name).num_batches_tracked before and after one step",
    )


RULE = Rule(
    "statistics_move_twice",
    frozenset({"statistics_moves"}),
    "Running statistics that are updated more than once for each backward pass.",
    "Activation checkpointing runs a block again during the backward pass; a second forward for a metric, a teacher or "
    "a penalty counts its batch too. The momentum is then effectively larger, and odd batches enter the average.",
    "Layers that are shared between branches are called several times by design (see shared_norm).",
    (
        "https://github.com/pytorch/pytorch/issues/96136",
        "https://github.com/m2lines/Samudra/issues/572",
        "https://github.com/Tencent/YOLO-Master/issues/262",
    ),
    find,
)
