"""Run directory -> summary: every number that a page shows, computed from what is on disk, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from normkit.lab.analyse.arms import ArmCells, compare, describe, partner_of
from normkit.lab.analyse.curves import POINTS
from normkit.lab.analyse.directory import RunDirectory, arm_of, knob_of, read
from normkit.lab.analyse.intervals import LEVEL, RESAMPLES
from normkit.vocabulary.record import Record, encode, write_json

SCHEMA = 1
POINTS_OF_A_SWEEP = 600  # shared by its values: curves are drawn once per value, so each may be coarser


def analyse(directory: str | Path) -> dict[str, Any]:
    """The summary of a run directory, also written to its summary.json.

    Works at any time: unfinished cells are counted as such. The same directory always gives the same summary.
    Raises ValueError when the directory holds no experiment (see ``normkit.lab.analyse.directory.read``).
    """
    run = read(directory)
    experiment = run.experiment
    sweep = experiment.get("sweep")
    values = sweep["values"] if sweep else [None]
    points = max(40, POINTS_OF_A_SWEEP // len(values)) if sweep else POINTS
    summary = encode(
        {
            "schema": SCHEMA,
            "experiment": experiment,
            "statistics": {"level": LEVEL, "resamples": RESAMPLES, "interval": "expanded percentile bootstrap"},
            "points": [_point(run, value, points) for value in values],
            "runs": [_run(cell) for cell in run.cells],
            "common_configuration": _common([cell.config for cell in run.cells]),
            "problems": run.problems,
        }
    )
    write_json(run.path / "summary.json", summary)
    return summary


def _point(run: RunDirectory, value: Any, points: int) -> dict[str, Any]:
    """All arms at one value of the knob (None: there is no sweep), in the order of the command."""
    experiment = run.experiment
    names = [arm["name"] for arm in experiment["arms"]]
    cells = {name: _cells_of(run, name, value) for name in names}
    higher = bool(experiment["metric"]["higher_is_better"])
    baseline = cells[experiment["baseline"]]
    arms = []
    for name in names:
        arm = {"name": name, **describe(cells[name], _chosen(experiment, name, value), points, higher)}
        if name != experiment["baseline"]:
            arm |= compare(baseline, cells[name], higher)
        if partner := partner_of(experiment, name):
            arm["like_for_like"] = {"against": partner, **compare(cells[partner], cells[name], higher)}
        arms.append(arm)
    return {"knob": value, "arms": arms}


def _cells_of(run: RunDirectory, arm: str, value: Any) -> ArmCells:
    mine = [cell for cell in run.cells if arm_of(cell) == arm and knob_of(cell) == value]
    by_seed = {cell.config["seed"]: cell for cell in mine if cell.config["phase"] == "final"}
    seeds = run.experiment["seeds"]
    return ArmCells(
        search=[cell for cell in mine if cell.config["phase"] == "search"],
        final={seed: by_seed[seed] for seed in seeds if seed in by_seed},
        planned=len(seeds),
        hopeless=_hopeless(run.experiment, arm, value),
    )


def _chosen(experiment: dict[str, Any], arm: str, value: Any) -> dict[str, Any] | None:
    """The rate that the search chose; the key carries the knob value as JSON writes it."""
    chosen = experiment.get("chosen") or {}
    keys = [arm] if value is None else [f"{arm}@{value}", f"{arm}@{value:g}" if isinstance(value, float) else ""]
    return next((chosen[key] for key in keys if key in chosen), None)


def _hopeless(experiment: dict[str, Any], arm: str, value: Any) -> bool:
    """Whether the search is over and left the arm without a rate, because every one of its runs crashed."""
    searched = (experiment.get("rates") or {}).get("searched") or {}
    return ("" if value is None else str(value)) in searched and _chosen(experiment, arm, value) is None


def _run(cell: Record) -> dict[str, Any]:
    """One row of the list of all runs."""
    config, status = cell.config, cell.status
    row = {"cell": cell.name, "arm": arm_of(cell), "knob": knob_of(cell)}
    row |= {key: config[key] for key in ("phase", "lr", "seed")}
    measured = ("state", "reason", "attempts", "steps", "train_seconds", "steps_to_target", "seconds_to_target")
    row |= {key: status.get(key) for key in (*measured, "best_validation", "test", "ms_per_step")}
    row |= {
        key: status[key]
        for key in ("cpu_seconds", "test_exact", "test_batch", "measures")
        if status.get(key) is not None
    }
    if status.get("traceback"):
        row["traceback"] = status["traceback"]
    return row


def _common(configs: list[dict[str, Any]]) -> dict[str, Any]:
    """What every run shares; together with its row in the list this is a run's whole configuration."""
    if not configs:
        return {}
    return {key: value for key, value in configs[0].items() if all(c.get(key) == value for c in configs)}
