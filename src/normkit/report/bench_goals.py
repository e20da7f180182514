"""What the project asks of the CPU kernels, beside what runs of ``normkit bench`` measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from normkit.report import bench_summary
from normkit.report import numbers as n
from normkit.report.document import Table

Record = dict[str, Any]
SLOWER = 0.95
"""No shape is to be slower than this, as times as fast as torch's own layer."""
BOTH = ("float32", "bfloat16")


def _of_resnet(record: Record) -> bool:
    return str(record["reason"]).startswith("ResNet-50")


def _of_a_megabyte(record: Record) -> bool:
    return record["tensor_mb"] >= 0.99


def _rows_or_volumes(record: Record) -> bool:
    return record["op"] == "layer_norm" or (len(record["shape"]) in (2, 5) and record["shape"] != [60, 100])


@dataclass(frozen=True)
class Goal:
    """Forward and backward, as times as fast as the peer: the geometric mean over shapes."""

    what: str
    ops: tuple[str, ...]
    """Patterns."""
    layout: str
    least: float
    """What is asked beside torch's own layer."""
    types: tuple[str, ...] = BOTH
    each: bool = False
    """Every type has to reach it by itself; otherwise the mean is over the cells of all types."""
    compiled: float | None = None
    """The least that is asked beside ``torch.compile`` of torch's own layer; None: nothing is."""
    counts: Callable[[Record], bool] = lambda record: True
    """Which shapes."""


CONTIGUOUS, LAST = "contiguous", "channels_last"
RELU, ALONE = ("batch_norm+relu", "batch_norm+add+relu"), ("batch_norm",)
RMS = "RMS norm; rows of a megabyte and more"
GOALS = (
    Goal("batch norm, ReLU, with and without a sum; ResNet-50", RELU, CONTIGUOUS, 2.2, each=True, counts=_of_resnet),
    Goal("batch norm, ReLU, with and without a sum; ResNet-50", RELU, LAST, 1.8, each=True, counts=_of_resnet),
    Goal("batch norm; ResNet-50", ALONE, CONTIGUOUS, 1.8, compiled=1.3, counts=_of_resnet),
    Goal("batch norm; ResNet-50", ALONE, LAST, 1.4, compiled=1.3, counts=_of_resnet),
    Goal("instance norm", ("instance_norm*",), CONTIGUOUS, 2.0, compiled=1.4),
    Goal("instance norm", ("instance_norm*",), LAST, 3.0, compiled=1.4),
    Goal("group norm + SiLU; diffusion", ("group_norm+silu",), CONTIGUOUS, 1.7, compiled=1.4),
    Goal("group norm + SiLU; diffusion", ("group_norm+silu",), LAST, 2.0, compiled=1.4),
    Goal(RMS, ("rms_norm",), CONTIGUOUS, 5.0, ("float32",), compiled=1.5, counts=_of_a_megabyte),
    Goal(RMS, ("rms_norm",), CONTIGUOUS, 8.0, ("bfloat16",), compiled=1.3, counts=_of_a_megabyte),
    Goal(
        "layer norm; batch norm of features and of volumes",
        ("layer_norm", "batch_norm", "batch_norm+relu"),
        CONTIGUOUS,
        1.0,
        compiled=1.0,
        counts=_rows_or_volumes,
    ),
    Goal("layer and RMS norm over the channels of images", ("*_channels_first",), CONTIGUOUS, 2.0),
)


def table(runs: Sequence[Sequence[Record]], allocator: str = "pinned", *, compiled: bool = False) -> Table:
    """One row per goal, beside torch's own layer or beside ``torch.compile`` of it.

    Of a shape that several runs measured, the median counts.
    """
    about = {_cell(r): r for run in runs for r in run if r.get("kind") == "op" and r.get("state") == "measured"}
    measured = bench_summary.speedups(runs, allocator, "torch.compile" if compiled else "torch")
    rows = []
    for goal in GOALS:
        least = goal.compiled if compiled else goal.least
        if least is None:
            continue
        row = [goal.what, goal.layout.replace("_", " "), f"{n.factor(least)}×"]
        by_type = [[v for cell, v in measured.items() if _belongs(goal, dtype, about[cell])] for dtype in BOTH]
        together = [by_type[0] + by_type[1]]
        means = [statistics.geometric_mean(values) for values in (by_type if goal.each else together) if values]
        reached = "yes" if all(mean >= least for mean in means) else "no"
        rows.append([*row, *map(bench_summary.cell, by_type), reached if means else n.NOTHING])
    return Table(["norm", "layout", "asked", *BOTH, "reached"], rows, "", frozenset(range(2, 5)))


def slower(runs: Sequence[Sequence[Record]], allocator: str = "pinned") -> list[str]:
    """The cells that are slower than torch's own layer by more than is asked, the slowest first."""
    found = bench_summary.speedups(runs, allocator)
    return [
        f"{op} {'x'.join(map(str, shape))} {dtype} {layout.replace('_', ' ')} {n.factor(value)}×"
        for (op, dtype, layout, shape), value in sorted(found.items(), key=lambda item: item[1])
        if value < SLOWER
    ]


def _belongs(goal: Goal, dtype: str, record: Record) -> bool:
    return (
        dtype in goal.types
        and (record["dtype"], record["layout"]) == (dtype, goal.layout)
        and any(fnmatchcase(record["op"], pattern) for pattern in goal.ops)
        and goal.counts(record)
    )


def _cell(record: Record) -> bench_summary.Cell:
    return record["op"], record["dtype"], record["layout"], tuple(record["shape"])
