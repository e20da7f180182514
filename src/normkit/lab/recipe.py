"""Recipe: the question (task, arms, budget, seeds, sweep), and the runs that answer it.

Fair by construction: the grid, the seeds, the steps and the target are those of the recipe, never of an arm. Search
seeds and final seeds are different, so no final run uses a split or an order that chose its learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from normkit.lab.arm import Arm
from normkit.lab.cell import FINAL, SEARCH, Cell, short_hash
from normkit.lab.knob import BATCH_SIZE, Sweep

EXTENSIONS = 3  # grid steps that may be added on each side
FIRST_SEARCH_SEED = 1000
LEAST_RATES = 7


@dataclass(frozen=True)
class Budget:
    """rates: how many of the middle values of the grid; seeds: of the search and of the final runs."""

    name: str
    rates: int
    search_seeds: int
    seeds: int


BUDGETS = {
    "quick": Budget("quick", rates=7, search_seeds=1, seeds=3),
    "default": Budget("default", rates=9, search_seeds=2, seeds=10),
    "thorough": Budget("thorough", rates=9, search_seeds=5, seeds=30),
}


@dataclass(frozen=True)
class Recipe:
    """The question a run directory answers; two recipes with one hash have the same runs."""

    name: str
    task: str
    arms: tuple[Arm, ...]
    baseline: str
    optimizer: str
    budget: str
    rates: tuple[float, ...]
    search_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    steps: int
    eval_every: int
    batch_size: int
    target: float
    data: str
    code: str
    options: Mapping[str, Any] = field(default_factory=dict)
    sweep: Sweep | None = None

    def question(self) -> dict[str, Any]:
        """What two directories must agree on to hold the same experiment, as plain JSON."""
        return {
            "task": self.task,
            "options": dict(self.options),
            "arms": [arm.record(self.optimizer) for arm in self.arms],
            "baseline": self.baseline,
            "budget": self.budget,
            "rates": {"grid": list(self.rates), "extensions": EXTENSIONS, "seeds": list(self.search_seeds)},
            "seeds": list(self.seeds),
            "sweep": {"knob": self.sweep.knob, "values": list(self.sweep.values)} if self.sweep else None,
            "steps": self.steps,
            "eval_every": self.eval_every,
            "batch_size": self.batch_size,
            "target": self.target,
            "data": self.data,
            "code": self.code,
        }

    @property
    def hash(self) -> str:
        return short_hash(self.question())

    @property
    def values(self) -> tuple[Any, ...]:
        """The values of the swept knob; one None without a sweep."""
        return self.sweep.values if self.sweep else (None,)

    def search_cells(self, rates: Sequence[float], value: Any, threads: int) -> list[Cell]:
        """Every arm at every rate with every search seed: the same number of trials for each arm."""
        return [
            self.cell(arm, lr, seed, SEARCH, value, threads)
            for seed in self.search_seeds
            for lr in rates
            for arm in self.arms
        ]

    def final_cells(self, chosen: Mapping[str, float], value: Any, threads: int) -> list[Cell]:
        """Every arm at its chosen rate with every fresh seed; an arm without a rate has no final runs."""
        return [
            self.cell(arm, chosen[arm.name], seed, FINAL, value, threads)
            for seed in self.seeds
            for arm in self.arms
            if arm.name in chosen
        ]

    def cell(self, arm: Arm, lr: float, seed: int, phase: str, value: Any, threads: int) -> Cell:
        """One run; for a swept batch size all values see equally many samples, so steps shrink as batches grow."""
        options, steps, eval_every, batch_size = dict(self.options), self.steps, self.eval_every, self.batch_size
        if self.sweep and self.sweep.knob == BATCH_SIZE:
            batch_size = int(value)
            steps = max(1, round(self.steps * self.batch_size / batch_size))
            eval_every = max(1, round(self.eval_every * self.batch_size / batch_size))
        elif self.sweep and self.sweep.option:
            options[self.sweep.option] = value
        return Cell(
            task=self.task,
            arm=arm,
            optimizer=self.optimizer,
            lr=lr,
            seed=seed,
            phase=phase,
            steps=steps,
            eval_every=eval_every,
            batch_size=batch_size,
            target=self.target,
            threads=threads,
            data=self.data,
            code=self.code,
            options=options,
            knob={"name": self.sweep.knob, "value": value} if self.sweep else None,
        )


def chosen_key(arm: str, value: Any) -> str:
    """The key of experiment.json's `chosen`: `batch`, or `batch@32` in a sweep."""
    return arm if value is None else f"{arm}@{value}"


def middle(rates: Sequence[float], count: int) -> tuple[float, ...]:
    """The `count` middle values of a grid: what a smaller budget searches."""
    spare = max(0, len(rates) - count)
    return tuple(rates[spare // 2 : len(rates) - (spare - spare // 2)])
