"""What only a watched run has: curves over its steps, heat maps, updates, ranks, and where the first NaN came from."""

from __future__ import annotations

from typing import Any

from normkit.report.document import Block, Section, Table, Text
from normkit.report.figures import drawn
from normkit.report.finding_parts import numbers, value
from normkit.vocabulary.evidence import Evidence

LOSSES = {
    "loss_training": "train mode",
    "loss_running": "running statistics",
    "loss_batch_statistics": "batch statistics",
}
MAPS = (
    ("activation_std", "Standard deviation of what norms and activations give", ""),
    ("mean_drift", "Drift: batch mean against running mean", "running deviations"),
    ("variance_drift", "Drift: batch variance against running variance", "|log ratio|"),
    ("gradient_norm", "Gradient norm", ""),
    ("dead_share", "Dead units", "share"),
    ("stable_rank", "Stable rank of a batch", "dimensions"),
)
HABIT = (1e-3, "0.001, the usual size")


def three_curves(evidence: Evidence) -> list[Section]:
    """The question of batch norm at one glance: where they part, the running statistics are what is wrong, or not."""
    blocks: list[Block] = []
    series = {words: numbers(evidence, quantity, "") for quantity, words in LOSSES.items()}
    if any(len(points) > 1 for points in series.values()):
        title = "Loss on the sampled batches: train mode, running statistics, batch statistics"
        blocks += drawn("over_steps.curves", series, title, "loss", "losses")
        blocks.append(Text(READING, "note"))
    else:
        rows = [[words, value(got)] for q, words in LOSSES.items() if (got := evidence.number(q)) is not None]
        rows += [
            [words, value(got)]
            for q, words in (
                ("train_eval_gap", "outputs, train mode against running statistics: relative difference"),
                ("batch_statistics_gap", "outputs, batch statistics against running statistics: relative difference"),
            )
            if (got := evidence.number(q)) is not None
        ]
        blocks += (
            [Table(["statistics", "loss or gap"], rows, numeric=frozenset({1})), Text(READING, "note")] if rows else []
        )
    own = {"loss": numbers(evidence, "loss", ""), "learning rate": numbers(evidence, "learning_rate", "")}
    for words, points in own.items():
        if len({value for _, value in points}) > 1:
            blocks += drawn("over_steps.curves", {words: points}, words, words, words.replace(" ", "-"))
    return [Section("statistics", "Train mode, running statistics, batch statistics", blocks)] if blocks else []


READING = (
    "The same batch three times. Running statistics far above both others: they are stale, and re-estimating them "
    "helps. Batch and running statistics together, both above train mode: it is dropout or another difference between "
    "the modes, not the statistics."
)


def heat_maps(evidence: Evidence) -> list[Section]:
    """One map per quantity that was read at two steps or more."""
    blocks: list[Block] = []
    for quantity, title, unit in MAPS:
        values = {
            (module, step): number
            for module in _rows(evidence, quantity)
            for step, number in numbers(evidence, quantity, module)
        }
        steps = sorted({step for _, step in values})
        if len(steps) > 1:
            layers = list(dict.fromkeys(layer for layer, _ in values))
            blocks += drawn("heat.heat_map", title, unit, layers, steps, values, f"map-{quantity}")
    return [Section("maps", "Layer by step", [Text(ONE_SCALE, "note"), *blocks])] if blocks else []


def _rows(evidence: Evidence, quantity: str) -> tuple[str, ...]:
    """Of gradients, those of weight matrices, which are what the ratio is read of: biases would be half of the map."""
    matrices = evidence.modules("gradient_to_weight") if quantity == "gradient_norm" else ()
    return matrices or evidence.modules(quantity)


ONE_SCALE = (
    "One scale per map for all layers and steps; it is logarithmic where the values spread over more than a decade."
)


def updates(evidence: Evidence) -> list[Section]:
    """The size of an update against the size of what it updates, and the angle for weights."""
    blocks: list[Block] = []
    for quantity, title, line in (
        ("update_to_weight", "Update to weight: length of an update / length of the weight", HABIT),
        ("angle_per_step", "Angle of a weight per step, in radians", None),
    ):
        series = {
            module: points
            for module in evidence.modules(quantity)
            if len(points := [p for p in numbers(evidence, quantity, module) if p[1] > 0]) > 1
        }
        if series:
            blocks += drawn("over_steps.band", series, title, title.partition(":")[0], quantity, line=line)
    return [Section("updates", "Updates", blocks)] if blocks else []


def ranks(evidence: Evidence) -> list[Section]:
    """How far the running statistics of the processes are apart."""
    rows = []
    for module in evidence.modules("rank_spread"):
        points = numbers(evidence, "rank_spread", module)
        if points:
            rows.append([module, value(points[-1][1]), value(max(v for _, v in points)), str(points[-1][0])])
    if not rows:
        return []
    header = ["layer", "spread at the end, σ", "greatest", "step"]
    table = Table(header, rows, "", frozenset({1, 2, 3}))
    return [Section("ranks", "Processes", [Text(RANKS, "note"), table])]


RANKS = (
    "Greatest difference of the running means between processes, in running standard deviations. 0: every process "
    "keeps the same statistics. Otherwise the checkpoint holds those of one of them."
)


def first_nan(trace: dict[str, Any] | None) -> list[Section]:
    """The forward frames up to the first output that is not finite."""
    if not trace:
        return []
    header = ["module", "class", "what", "|least|", "|greatest|", "not finite"]
    rows = [
        [
            frame["module"] or ("the batch" if frame["class"] == "batch" else "the model"),
            frame["class"],
            frame["what"],
            value(frame["least"]),
            value(frame["greatest"]),
            str(int(frame["nonfinite"])),
        ]
        for frame in trace["frames"]
    ]
    arms = ["error" if frame["nonfinite"] else None for frame in trace["frames"]]
    blocks: list[Block] = [Text(trace["verdict"]), Text(FRAMES, "note")]
    return [Section("first-nan", "The first NaN", [*blocks, Table(header, rows, "", frozenset({3, 4, 5}), arms)])]


FRAMES = (
    "Least and greatest absolute value (of the finite ones) of what went through, in the order of the forward pass."
)
