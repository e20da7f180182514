"""What a run is going to do: tasks, each for one child process to carry out, as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from normkit.bench.allocator import ALLOCATORS
from normkit.bench.blocks import BLOCKS, GROUPS
from normkit.bench.cases import Case, Level, choose
from normkit.bench.cell import Effort
from normkit.bench.models import MODELS
from normkit.bench.overhead import SIZES
from normkit.bench.synchronized import CASES, PROCESSES
from normkit.bench.watched import WATCHED

Task = dict[str, Any]
SPECIAL = (
    *("blocks", "memory", "models", "overhead", "synchronized", "watch"),
    *GROUPS,
    *(f"watch_{model}" for model in WATCHED),
    *MODELS,
)
"""Words of ``--op`` that are no op."""

EFFORTS: dict[Level, Effort] = {
    "quick": Effort(rounds=7, seconds=1.5, wanted=("torch", "normkit")),
    "default": Effort(rounds=15, seconds=12.0),
    "thorough": Effort(rounds=31, seconds=40.0),
}


@dataclass(frozen=True)
class Plan:
    """Every task is carried out once per allocator."""

    tasks: list[Task]
    effort: Effort = field(default_factory=Effort)
    allocators: Sequence[str] = ALLOCATORS
    threads: int = 1
    device: str = "cpu"


def tasks(
    level: Level,
    ops: Sequence[str] = (),
    shapes: Sequence[tuple[int, ...]] = (),
    dtypes: Sequence[str] = (),
    layouts: Sequence[str] = (),
) -> list[Task]:
    """The tasks for what was asked on the command line; nothing asked: every op of the level.

    Raises:
        ValueError: nothing fits.
    """
    special = [op for op in ops if op in SPECIAL]
    plain = [op for op in ops if op not in SPECIAL]
    found: list[Task] = []
    if plain or not special:
        types = dtypes or (("float32",) if level == "quick" else ("float32", "bfloat16"))
        found += _cells(choose(level, plain, shapes), types, layouts or (("contiguous",) if level == "quick" else ()))
    if "overhead" in special:
        found += [{**task, "overhead": True} for task in _cells(SIZES, dtypes or ("float32",), ("contiguous",))]
    if "synchronized" in special:
        cells = _cells(CASES, dtypes or ("float32",), ("contiguous",))
        found += [{**task, "processes": processes} for task in cells for processes in PROCESSES]
    if "memory" in special:
        found += [{"kind": "memory", "dtype": dtype} for dtype in dtypes or ("float32", "bfloat16")]
    for model in WATCHED:
        if "watch" in special or f"watch_{model}" in special:
            found += [{"kind": "watch", "model": model, "dtype": dtype} for dtype in dtypes or ("float32",)]
    found += _blocks(special, dtypes)
    for model in MODELS:
        if model in special or "models" in special:
            forms = [form for form in MODELS[model].layouts if not layouts or form in layouts]
            found += [
                {"kind": "model", "model": model, "dtype": dtype, "layout": form}
                for dtype in dtypes or ("float32", "bfloat16")
                for form in forms
            ]
    if not found:
        raise ValueError(
            f"none of these cases has the layout {', '.join(layouts)}.\n"
            "  channels_last is a layout of images and volumes: leave --layout out for rows"
        )
    return found


def case_of(task: Task) -> Case:
    """The case of a task that has been through JSON."""
    return Case(**{**task["case"], "shape": tuple(task["case"]["shape"])})


def _blocks(special: Sequence[str], dtypes: Sequence[str]) -> list[Task]:
    asked = [block for block in BLOCKS.values() if block.group in special or "blocks" in special]
    if asked and any(dtype != "float32" for dtype in dtypes):
        raise ValueError(f"blocks are timed in float32, not in {', '.join(dtypes)}.\n  leave --dtype out")
    return [{"kind": "block", "block": block.name, "dtype": "float32"} for block in asked]


def _cells(cases: Iterable[Case], dtypes: Sequence[str], layouts: Sequence[str]) -> list[Task]:
    return [
        {"kind": "op", "case": asdict(case), "dtype": dtype, "layout": layout}
        for case in cases
        for dtype in dtypes
        for layout in case.layouts
        if not layouts or layout in layouts
    ]
