"""The tables of a summary, each defined once as columns of text; terminal, page and Markdown only set them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from normkit.report import numbers as n
from normkit.report.document import Table
from normkit.report.labels import knob_value, label

Arm = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One column: its header and the text of its cell for (arm, metric)."""

    header: str
    cell: Callable[[Arm, dict[str, Any]], str]


def _reached(arm: Arm, _: Any) -> str:
    return f"{arm['runs']['reached']} of {arm['runs']['finished']}"


def _median(key: str, write: Callable[[float | None], str]) -> Callable[[Arm, Any], str]:
    """A median over runs of which half or more never arrive is later than the budget, and says so."""

    def cell(arm: Arm, _: Any) -> str:
        race = arm[key]
        if race["of"] and race["median"] is None:
            return "rarely" if race["reached"] else "never"
        return write(race["median"])

    return cell


def _edge(arm: Arm, _: Any) -> str:
    return n.rate(arm["lr"]) + (" (edge)" if arm["bound_hit"] else "")


RATE = Column("rate", _edge)
REACHED = Column("reach target", _reached)
STEPS = Column("steps to target", _median("steps_to_target", n.count))
FEWER = Column("fewer steps", lambda a, m: n.ratio(a.get("steps_ratio")))
SECONDS = Column("seconds to target", _median("seconds_to_target", n.seconds))
LESS = Column("less time", lambda a, m: n.ratio(a.get("seconds_ratio")))
TEST = Column("test {metric}", lambda a, m: n.metric_interval(a["test"], m))
GAP = Column("difference", lambda a, m: n.difference(a["test_difference"], m) if "test_difference" in a else "baseline")
USABLE = Column("usable rates", lambda a, m: n.decades(a["usable_rates"]))
STABLE = Column("stable rates", lambda a, m: n.decades(a["stable_rates"]))
DIVERGED = Column("diverged", lambda a, m: n.count(a["runs"]["diverged"]))
CENSORED = Column("not in budget", lambda a, m: n.count(a["runs"]["censored"]))
FAILED = Column("failed", lambda a, m: n.count(a["runs"]["failed"]))
UNFINISHED = Column("unfinished", lambda a, m: n.count(a["runs"]["unfinished"]))
MS = Column("ms per step", lambda a, m: n.significant(a["ms_per_step"]))
SHARE = Column("in norms", lambda a, m: n.share(a["norm_share"]))
PARAMETERS = Column("parameters", lambda a, m: n.NOTHING if a["parameters"] is None else f"{a['parameters']:,.0f}")
CPU = Column("CPU ms per step", lambda a, m: n.significant(a.get("cpu_ms_per_step")))
MEMORY = Column(
    "peak memory, MB", lambda a, m: n.NOTHING if a["peak_memory_mb"] is None else f"{a['peak_memory_mb']:.0f}"
)
DEAD = Column("dead units", lambda a, m: n.share(a["dead_units"]))
AGAINST = Column("against", lambda a, m: label(a["against"]))
EXACT = Column("exact statistics", lambda a, m: _elsewhere(a, m, "test_exact"))
BY_BATCH = Column("statistics of the test batch", lambda a, m: _elsewhere(a, m, "test_batch"))
VARIANCE = Column("variance, evaluation / training", lambda a, m: variance_ratio(a["variance_ratio"]))
EVALUATION = Column("ms in evaluation", lambda a, m: n.significant(_folding(a, "evaluation_ms")))
FOLDED = Column("ms folded", lambda a, m: folded(a))
FOLD_ERROR = Column("fold error", lambda a, m: fold_error(a))

RUNNING = replace(TEST, header="running statistics")

RESULTS = (RATE, STEPS, FEWER, SECONDS, LESS, TEST, GAP)
RACE = (REACHED, CENSORED, DIVERGED, USABLE, STABLE)
LIKE_FOR_LIKE = (AGAINST, FEWER, LESS, GAP)
AT_TEST = (RUNNING, EXACT, BY_BATCH)
IN_A_SWEEP = (STEPS, FEWER, SECONDS, LESS, TEST, DIVERGED)
TERMINAL = (RATE, STEPS, FEWER, SECONDS, LESS, TEST, USABLE, DIVERGED, MS)


def _folding(arm: Arm, key: str) -> float | None:
    return (arm.get("folding") or {}).get(key)


def folded(arm: Arm) -> str:
    """Milliseconds in evaluation with the norms folded away, and how many times as fast that is: "1.2 (1.5×)"."""
    faster = _folding(arm, "times_as_fast")
    return n.NOTHING if faster is None else f"{n.significant(_folding(arm, 'folded_ms'))} ({n.factor(faster)}×)"


def fold_error(arm: Arm) -> str:
    """The greatest over the runs."""
    error = _folding(arm, "error")
    return n.NOTHING if error is None else f"{error:.0e}"


def _elsewhere(arm: Arm, about: dict[str, Any], key: str) -> str:
    """A test metric with other statistics, and its difference to the one with running statistics."""
    found = arm.get(key)
    if not found or found["mean"] is None:
        return n.NOTHING
    return f"{n.metric_interval(found, about)} ({n.difference(found['difference'], about)})"


def variance_ratio(layers: dict[str, float | None] | None) -> str:
    """Lowest and highest ratio over the norm layers."""
    known = [value for value in (layers or {}).values() if value is not None]
    if not known:
        return n.NOTHING
    low, high = n.significant(min(known)), n.significant(max(known))
    return low if low == high else f"{low} to {high}"


def table(summary: dict[str, Any], columns: Sequence[Column], caption: str = "") -> Table:
    """One row per arm (and knob value in a sweep), one column per entry of ``columns``."""
    experiment = summary["experiment"]
    about, sweep = experiment["metric"], experiment.get("sweep")
    header = [column.header.format(metric=about["name"]) for column in columns]
    first = [sweep["knob"], "arm"] if sweep else ["arm"]
    rows, arms = [], []
    for point in summary["points"]:
        for arm in point["arms"]:
            start = [knob_value(point["knob"])] if sweep else []
            rows.append([*start, label(arm["name"]), *(column.cell(arm, about) for column in columns)])
            arms.append(arm["name"])
    numeric = frozenset(range(len(first), len(first) + len(columns)))
    return Table(first + header, rows, caption, numeric, arms)


def rows(summary: dict[str, Any]) -> list[list[str]]:
    """The main table as text, header first."""
    main = table(summary, main_columns(summary))
    return [main.header, *main.rows]


def main_columns(summary: dict[str, Any]) -> tuple[Column, ...]:
    """The columns that answer the question; a sweep has so many rows that it leaves out what its page shows."""
    return (
        *(IN_A_SWEEP if summary["experiment"].get("sweep") else TERMINAL),
        *extras(summary),
        *folding_columns(summary)[:2],
    )


def race_columns(summary: dict[str, Any]) -> tuple[Column, ...]:
    """Who arrived and at which rates; runs that crashed or are still to come only where there are any."""
    runs = [arm["runs"] for point in summary["points"] for arm in point["arms"]]
    lost = ((FAILED, "failed"), (UNFINISHED, "unfinished"))
    return (*RACE[:3], *(column for column, key in lost if any(run[key] for run in runs)), *RACE[3:])


def extras(summary: dict[str, Any]) -> tuple[Column, ...]:
    """Columns that only some experiments fill: dead units (ReLU), variance ratios (dropout)."""
    arms = [arm for point in summary["points"] for arm in point["arms"]]
    wanted = ((DEAD, "dead_units"), (VARIANCE, "variance_ratio"))
    return tuple(column for column, key in wanted if any(arm[key] is not None for arm in arms))


def cost_columns(summary: dict[str, Any]) -> tuple[Column, ...]:
    """What a step costs; by the processor where it was recorded."""
    measured = any(arm.get("cpu_ms_per_step") for point in summary["points"] for arm in point["arms"])
    return (MS, *([CPU] if measured else []), SHARE, PARAMETERS, MEMORY, *folding_columns(summary))


def folding_columns(summary: dict[str, Any]) -> tuple[Column, ...]:
    """Evaluation before and after folding, where the experiment asked for it."""
    asked = any(arm.get("folding") for point in summary["points"] for arm in point["arms"])
    return (EVALUATION, FOLDED, FOLD_ERROR) if asked else ()


def at_test(summary: dict[str, Any]) -> Table | None:
    """Test metric by the statistics used in evaluation; None where no arm has running statistics, or none was asked."""
    points = [
        point | {"arms": [arm for arm in point["arms"] if (arm.get("test_exact") or {}).get("mean") is not None]}
        for point in summary["points"]
    ]
    return table(summary | {"points": points}, AT_TEST) if any(point["arms"] for point in points) else None


def like_for_like(summary: dict[str, Any]) -> Table | None:
    """Every arm that has one against its partner without a norm; None when the baseline is everybody's partner."""
    points = [
        point | {"arms": [arm | arm["like_for_like"] for arm in point["arms"] if "like_for_like" in arm]}
        for point in summary["points"]
    ]
    if not any(point["arms"] for point in points):
        return None
    drawn = table(summary | {"points": points}, LIKE_FOR_LIKE)
    return replace(drawn, numeric=drawn.numeric - {drawn.header.index("against")})


def variance_by_norm(summary: dict[str, Any]) -> Table | None:
    """The variance ratio at each norm, where the column of the arms has room for lowest and highest only."""
    sweep = summary["experiment"].get("sweep")
    header = [*([sweep["knob"]] if sweep else []), "arm", "norm", VARIANCE.header]
    rows, arms = [], []
    for point in summary["points"]:
        start = [knob_value(point["knob"])] if sweep else []
        for arm in point["arms"]:
            for layer, ratio in (arm["variance_ratio"] or {}).items():
                rows.append([*start, label(arm["name"]), layer, n.significant(ratio)])
                arms.append(arm["name"])
    return Table(header, rows, numeric=frozenset({len(header) - 1}), arms=arms) if rows else None
