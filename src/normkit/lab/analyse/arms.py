"""One arm at one value of the knob: its own numbers, and its paired comparison with the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from normkit.lab.analyse.curves import (
    gradient_norms,
    learning_curve,
    middle,
    state_gradients,
    unit_percentiles,
)
from normkit.lab.analyse.directory import as_number, number
from normkit.lab.analyse.generated import measures, pictures
from normkit.lab.analyse.intervals import Finish, mean_interval, median_finish, paired_difference, paired_ratio
from normkit.lab.analyse.rates import sensitivity, stable_range, usable_range
from normkit.report.labels import is_plain
from normkit.vocabulary.record import Record


@dataclass(frozen=True)
class ArmCells:
    """The cells of one arm at one knob value: the search, and the final runs by seed in the experiment's order."""

    search: list[Record]
    final: dict[int, Record]
    planned: int
    hopeless: bool = False  # every run of its search crashed, so there is no rate and no final run will come

    @property
    def outcomes(self) -> dict[int, Record]:
        """Final runs that have an outcome: a crash or an unfinished run says nothing about the arm."""
        return {seed: cell for seed, cell in self.final.items() if cell.state in ("done", "diverged")}


def describe(
    cells: ArmCells, chosen: dict[str, Any] | None, points: int, higher_is_better: bool = True
) -> dict[str, Any]:
    """Everything about an arm that needs no other arm."""
    ran = list(cells.outcomes.values())
    tests = [value for value in (number(cell, "test") for cell in ran) if value is not None]
    mean, low, high = mean_interval(tests)
    rows = sensitivity(cells.search)
    return {
        "lr": _rate(cells, chosen),
        "bound_hit": (chosen or {}).get("bound_hit"),
        "runs": _counts(cells),
        "steps_to_target": median_finish([_steps(cell) for cell in ran]),
        "seconds_to_target": median_finish([_seconds(cell) for cell in ran]),
        "test": {"mean": mean, "low": low, "high": high, "n": len(tests)},
        **{key: _elsewhere(ran, key, higher_is_better) for key in ("test_exact", "test_batch")},
        "usable_rates": usable_range(rows),
        "stable_rates": stable_range(rows),
        "search": rows,
        **{key: middle(number(cell, key) for cell in ran) for key in ("ms_per_step", "norm_share", "dead_units")},
        "cpu_ms_per_step": middle(_cpu_ms(cell) for cell in ran),
        "parameters": middle(number(cell, "parameters") for cell in ran),
        "peak_memory_mb": middle(number(cell, "peak_memory_mb") for cell in ran),
        "variance_ratio": _variance_ratio(ran),
        **({"switches": switches} if (switches := _switches(ran)) else {}),
        **({"folding": folding} if (folding := _folding(ran)) else {}),
        **({"measures": measured} if (measured := measures(ran)) else {}),
        **({"pictures": kept} if (kept := pictures(ran)) else {}),
        "curve": learning_curve(ran, points),
        "divergences": [_divergence(cell) for cell in ran if cell.state == "diverged"],
        "unit": unit_percentiles(ran, min(points, 200)),
        "gradient_norms": gradient_norms(ran),
        **({"state_gradients": by_time} if (by_time := state_gradients(ran)) else {}),
    }


def compare(baseline: ArmCells, arm: ArmCells, higher_is_better: bool) -> dict[str, Any]:
    """The arm against the baseline, seed by seed, over the seeds at which both have an outcome."""
    theirs, ours = baseline.outcomes, arm.outcomes
    seeds = [seed for seed in theirs if seed in ours]
    tests = [(number(theirs[seed], "test"), number(ours[seed], "test")) for seed in seeds]
    both = [(b, a) for b, a in tests if b is not None and a is not None]
    return {
        "steps_ratio": paired_ratio([_steps(theirs[s]) for s in seeds], [_steps(ours[s]) for s in seeds]),
        "seconds_ratio": paired_ratio([_seconds(theirs[s]) for s in seeds], [_seconds(ours[s]) for s in seeds]),
        "test_difference": paired_difference([b for b, _ in both], [a for _, a in both], higher_is_better),
    }


def partner_of(experiment: dict[str, Any], name: str) -> str | None:
    """The arm without a norm that is otherwise this one: same optimizer, dropout and gain.

    What a norm does together with AdamW is its ratio to AdamW without a norm, not to plain SGD. None for an arm without
    a norm, where there is no such arm, and where it is the baseline, whose ratio every arm has. The placement of a norm
    that is not there is no difference.
    """
    about = {arm["name"]: arm for arm in experiment["arms"]}
    if is_plain(about[name]):
        return None
    partner = next((arm["name"] for arm in about.values() if is_plain(arm) and _kit(arm) == _kit(about[name])), None)
    return None if partner == experiment["baseline"] else partner


def _kit(arm: dict[str, Any]) -> tuple[Any, ...]:
    return arm.get("optimizer"), arm.get("dropout", 0.0), arm.get("init", 1.0)


def _switches(ran: Sequence[Record]) -> dict[str, Any] | None:
    """What the strategy of the arm did, over the runs; None for an arm without one."""
    lines = [line for cell in ran for line in cell.status.get("switches") or ()]
    if not lines:
        return None
    done = [line for line in lines if "failed" not in line]
    each = lambda key: middle(line[key] for line in done if line[key] is not None)
    return {
        "switched": len(done),
        "failed": [line for line in lines if "failed" in line][:5],
        "first_step": min((line["step"] for line in done), default=None),
        "last_step": max((line["step"] for line in done), default=None),
        "moved_in_training": each("moved_in_training"),
        "moved_in_evaluation": each("moved_in_evaluation"),
        "ms_per_step_before": middle(number(cell, "ms_per_step_before") for cell in ran),
        "ms_per_step_after": middle(number(cell, "ms_per_step_after") for cell in ran),
    }


def _folding(ran: Sequence[Record]) -> dict[str, Any] | None:
    """Evaluation as it is and folded, medians over the runs, and the greatest error; None where it was not asked."""
    before = middle(number(cell, "evaluation_ms") for cell in ran)
    if before is None:
        return None
    both = [(number(cell, "evaluation_ms"), number(cell, "folded_ms")) for cell in ran]
    return {
        "evaluation_ms": before,
        "folded_ms": middle(folded for _, folded in both),
        "times_as_fast": middle(trained / folded for trained, folded in both if trained and folded),
        "error": max((error for cell in ran if (error := number(cell, "fold_error")) is not None), default=None),
    }


def _rate(cells: ArmCells, chosen: dict[str, Any] | None) -> float | None:
    if chosen:
        return chosen["lr"]
    return next((cell.config["lr"] for cell in cells.final.values()), None)


def _counts(cells: ArmCells) -> dict[str, int]:
    ran = list(cells.outcomes.values())
    reached = sum(number(cell, "steps_to_target") is not None for cell in ran)
    failed = cells.planned if cells.hopeless else sum(cell.state == "failed" for cell in cells.final.values())
    return {
        "planned": cells.planned,
        "finished": len(ran),
        "reached": reached,
        "censored": len(ran) - reached,
        "diverged": sum(cell.state == "diverged" for cell in ran),
        "failed": failed,
        "unfinished": cells.planned - len(ran) - failed,
    }


def _elsewhere(ran: Sequence[Record], key: str, higher_is_better: bool) -> dict[str, Any] | None:
    """The test metric with other statistics, and its difference to the one with running statistics, seed by seed."""
    pairs = [(number(cell, "test"), number(cell, key)) for cell in ran]
    both = [(running, other) for running, other in pairs if running is not None and other is not None]
    if not both:
        return None
    mean, low, high = mean_interval([other for _, other in both])
    gap = paired_difference([running for running, _ in both], [other for _, other in both], higher_is_better)
    return {"mean": mean, "low": low, "high": high, "n": len(both), "difference": gap}


def _cpu_ms(cell: Record) -> float | None:
    spent, taken = number(cell, "cpu_seconds"), number(cell, "steps")
    return 1e3 * spent / taken if spent and taken else None


def _steps(cell: Record) -> Finish:
    return Finish(number(cell, "steps_to_target"), float(cell.config["steps"]))


def _seconds(cell: Record) -> Finish:
    """The budget in seconds: what all steps would have taken; a run that diverged early does not get there sooner."""
    spent, taken = number(cell, "train_seconds") or 0.0, number(cell, "steps") or 0
    budget = spent * max(1.0, cell.config["steps"] / taken) if taken else 0.0
    return Finish(number(cell, "seconds_to_target"), budget)


def _divergence(cell: Record) -> dict[str, Any]:
    """Where a diverged run's curve ends: its last finite value of the metric."""
    known = [line for line in cell.metrics if as_number(line.get("validation")) is not None]
    last = known[-1] if known else {}
    return {"seed": cell.config["seed"], **{key: as_number(last.get(key)) for key in ("step", "seconds", "validation")}}


def _variance_ratio(cells: Sequence[Record]) -> dict[str, float | None] | None:
    """Per norm layer the median over seeds; the file may hold a list or a mapping by layer name."""
    tables = [_by_layer(cell.status.get("variance_ratio")) for cell in cells]
    tables = [table for table in tables if table]
    if not tables:
        return None
    return {layer: middle(as_number(table.get(layer)) for table in tables) for layer in tables[0]}


def _by_layer(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    if isinstance(value, list):
        return {str(index): item for index, item in enumerate(value)}
    return {"all": value} if as_number(value) is not None else {}
