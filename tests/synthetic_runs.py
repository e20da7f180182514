"""Run directories with known answers, written file by file as docs/run-directory.md says; no engine, no torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GRID = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]
STEPS = 2000
EVAL_EVERY = 5


@dataclass
class Script:
    """What one arm's runs shall do: steps to the target per seed (None: never), and the rest of its numbers."""

    steps: list[int | None]
    ms: float = 0.5
    test: list[float | None] | None = None
    lr: float = 0.3
    states: list[str] | None = None
    usable: tuple[float, float] = (0.1, 1.0)
    diverges_above: float = 5.0
    bound_hit: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)

    def state(self, index: int) -> str:
        return self.states[index] if self.states else "done"


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def experiment(arms: list[str], seeds: int, **changes: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "name": "digits",
        "task": "digits",
        "title": "Handwritten digits, 3 sigmoid layers of 100",
        "description": "The network of Ioffe & Szegedy (2015) on scikit-learn's 8x8 digits.",
        "budget": "default",
        "command": "normkit compare digits",
        "created": "2026-01-01T00:00:00Z",
        "arms": [
            {"name": arm, "norm": arm.split("+")[0], "optimizer": "adamw" if "+adamw" in arm else "sgd"} for arm in arms
        ],
        "baseline": arms[0],
        "metric": {"name": "accuracy", "higher_is_better": True, "unit": "fraction"},
        "target": 0.95,
        "steps": STEPS,
        "eval_every": EVAL_EVERY,
        "batch_size": 60,
        "split": {"train": 1000, "validation": 297, "test": 500},
        "rates": {"grid": GRID, "extensions": 3, "seeds": [100, 101, 102]},
        "seeds": list(range(seeds)),
        "sweep": None,
        "chosen": {},
        "environment": {"python": "3.11.7", "torch": "2.13.0", "normkit": "0.1.0", "cores": 2, "workers": 2},
        **changes,
    }


def directory(path: Path, scripts: dict[str, Script], **changes: Any) -> Path:
    """A finished experiment without a sweep."""
    first = next(iter(scripts.values()))
    description = experiment(list(scripts), len(first.steps), **changes)
    for name, script in scripts.items():
        description["chosen"][name] = {"lr": script.lr, "bound_hit": script.bound_hit}
        add_cells(path, description, name, script)
    write(path / "experiment.json", description)
    return path


def sweep(path: Path, knob: str, scripts: dict[Any, dict[str, Script]], **changes: Any) -> Path:
    """A finished sweep: knob value -> arm -> script."""
    arms = next(iter(scripts.values()))
    seeds = len(next(iter(arms.values())).steps)
    description = experiment(list(arms), seeds, sweep={"knob": knob, "values": list(scripts)}, **changes)
    for value, row in scripts.items():
        for name, script in row.items():
            description["chosen"][f"{name}@{value}"] = {"lr": script.lr, "bound_hit": script.bound_hit}
            add_cells(path, description, name, script, {"name": knob, "value": value})
    write(path / "experiment.json", description)
    return path


def add_cells(path: Path, description: dict[str, Any], name: str, script: Script, knob: Any = None) -> None:
    arm = next(arm for arm in description["arms"] if arm["name"] == name)
    config = {"task": "digits", "arm": arm, "knob": knob, "steps": description["steps"], "eval_every": EVAL_EVERY}
    config |= {"batch_size": 60, "target": description["target"], "threads": 1, "data": "abc", "hash": "0" * 8}
    prefix = name if knob is None else f"{name}-{knob['value']}"
    for lr in description["rates"]["grid"]:
        for seed in description["rates"]["seeds"]:
            folder = path / "cells" / f"{prefix}-search-lr{lr:g}-s{seed}"
            write(folder / "config.json", config | {"lr": lr, "seed": seed, "phase": "search"})
            write(folder / "status.json", _search_status(script, lr))
    for index, steps in enumerate(script.steps):
        seed = description["seeds"][index]
        folder = path / "cells" / f"{prefix}-final-lr{script.lr:g}-s{seed}"
        write(folder / "config.json", config | {"lr": script.lr, "seed": seed, "phase": "final"})
        write(folder / "status.json", _final_status(script, index, description["steps"]))
        if script.state(index) != "failed":
            write_lines(folder / "metrics.jsonl", _metrics(script, steps, script.state(index), description))
            write_lines(folder / "inside.jsonl", _inside(script, seed))


def _search_status(script: Script, lr: float) -> dict[str, Any]:
    reached = script.usable[0] <= lr <= script.usable[1]
    state = "diverged" if lr > script.diverges_above else "done"
    best = 0.97 if reached else 0.3 if state == "diverged" else 0.9
    steps = round(100 * (1 + abs(math.log10(lr / script.lr)))) if reached else None
    return {
        "state": state,
        "attempts": 1,
        "steps": STEPS,
        "steps_to_target": steps,
        "best_validation": best,
        "test": None,
    }


def _final_status(script: Script, index: int, budget: int) -> dict[str, Any]:
    steps, state = script.steps[index], script.state(index)
    if state == "failed":
        trace = 'Traceback (most recent call last):\n  File "net.py", line 3, in forward\nValueError: <shape> & size'
        return {"state": state, "reason": "ValueError: <shape> & size", "traceback": trace, "attempts": 1}
    taken = budget if state == "done" else 40
    return {
        "state": state,
        "reason": "loss is not finite at step 40" if state == "diverged" else None,
        "attempts": 1,
        "steps": taken,
        "train_seconds": taken * script.ms / 1000,
        "steps_to_target": steps,
        "seconds_to_target": None if steps is None else steps * script.ms / 1000,
        "best_validation": 0.97,
        "test": (script.test[index] if script.test else 0.96) if state == "done" else None,
        "ms_per_step": script.ms,
        "norm_share": 0.3,
        "parameters": 27710,
        "dead_units": None,
        "variance_ratio": None,
        "peak_memory_mb": 312.0,
    } | script.fields


def _metrics(script: Script, steps: int | None, state: str, description: dict[str, Any]) -> list[dict[str, Any]]:
    lines, last = [], 40 if state == "diverged" else description["steps"]
    for step in range(EVAL_EVERY, last + 1, EVAL_EVERY):
        way = step / (steps or 4 * description["steps"])
        value = 0.1 + 0.85 * min(1.0, way**0.5) + (0.03 * (1 - 1 / way) if way > 1 else 0)
        line = {"step": step, "seconds": step * script.ms / 1000, "train_loss": 2.3 * (1 - value)}
        lines.append(line | {"validation_loss": 2.4 * (1 - value), "validation": value})
    if state == "diverged":
        lines.append({"step": 45, "seconds": 0.1, "train_loss": "nan", "validation_loss": "nan", "validation": "nan"})
    return lines


def _inside(script: Script, seed: int) -> list[dict[str, Any]]:
    lines = []
    for step in range(0, 401, 20):
        drift = script.ms * math.log1p(step) + 0.1 * seed
        line: dict[str, Any] = {"step": step, "unit": {"layer": "3", "percentiles": [drift - 1, drift, drift + 1]}}
        if step in (0, 200, 400):
            line["gradient_norms"] = {f"layers.{i}": 0.5 / (1 + i) / (1 + step / 100) for i in range(4)}
        lines.append(line)
    return lines
