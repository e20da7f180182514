"""Arms against one that is not the baseline of the summary, seed by seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from normkit.lab.analyse.intervals import Finish, paired_difference, paired_ratio

Runs = Mapping[tuple[str, int], Mapping[str, Any]]
"""By arm and seed."""


def final_runs(summary: Mapping[str, Any], knob: Any = None) -> Runs:
    """The final runs of a summary that have an outcome, at one value of the knob."""
    return {
        (run["arm"], run["seed"]): run
        for run in summary["runs"]
        if run["phase"] == "final" and run["knob"] == knob and run["state"] in ("done", "diverged")
    }


def against(other: str, runs: Runs, name: str, higher_is_better: bool) -> dict[str, Any]:
    """The test metric of an arm less that of the other, over the seeds at which both have one."""
    pairs = [
        (runs[other, seed]["test"], run["test"])
        for (arm, seed), run in runs.items()
        if arm == name and (other, seed) in runs
    ]
    both = [(theirs, own) for theirs, own in pairs if theirs is not None and own is not None]
    found: dict[str, Any] = rounded(paired_difference([t for t, _ in both], [own for _, own in both], higher_is_better))
    return found


def race(other: str, runs: Runs, name: str, budget: int) -> dict[str, Any]:
    """How many times fewer steps an arm takes to the target than the other, over the seeds that both have."""
    seeds = [seed for arm, seed in runs if arm == name and (other, seed) in runs]
    finish = lambda arm: [Finish(runs[arm, seed]["steps_to_target"], float(budget)) for seed in seeds]
    found: dict[str, Any] = rounded(paired_ratio(finish(other), finish(name)))
    return found


def rounded(value: Any) -> Any:
    """Six digits are enough for every reader, and a last bit is no reason for another file."""
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value
