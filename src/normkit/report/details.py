"""The sentences under the answer: accuracy, cost of a step, learning-rate range, and everything that went wrong."""

from __future__ import annotations

from typing import Any

from normkit.report.generated import collapse
from normkit.report.labels import knob_value, label, listing, sentence
from normkit.report.numbers import decades, difference, factor, metric_interval, rate, share, significant

TRUSTED_SEEDS = (
    5  # below this no 95 % interval of a median exists: the range of n seeds holds it in 1 − 2^(1−n) of cases
)


def details(summary: dict[str, Any]) -> list[str]:
    """What a reader should know before quoting the answer; a sweep's tables and figures speak for themselves."""
    experiment, arms = summary["experiment"], summary["points"][0]["arms"]
    sentences = [_seeds(experiment)]
    if not experiment.get("sweep"):
        sentences += [_final_metric(experiment, arms), collapse(summary), _cost(experiment, arms), _ranges(arms)]
    every = [(point["knob"], arm) for point in summary["points"] for arm in point["arms"]]
    sentences += [
        _switches(every),
        _bounds(every),
        _lost(every),
        _unreadable(summary["problems"]),
        _environments(experiment),
    ]
    return [sentence(text) for text in sentences if text]


def _seeds(experiment: dict[str, Any]) -> str:
    n = len(experiment["seeds"])
    if n == 1:
        return "one seed: there is no interval, and one run proves nothing"
    if n < TRUSTED_SEEDS:
        return (
            f"{n} seeds: the intervals are the range over the seeds and hold the true median in about "
            f"{100 * (1 - 2 ** (1 - n)):.0f} % of such experiments, not 95 %"
        )
    return ""


def _final_metric(experiment: dict[str, Any], arms: list[dict[str, Any]]) -> str:
    about = experiment["metric"]
    baseline = next(arm for arm in arms if arm["name"] == experiment["baseline"])
    parts = [f"{label(baseline['name'])} {metric_interval(baseline['test'], about)}"]
    for arm in arms:
        if arm is baseline or arm["test"]["mean"] is None:
            continue
        gap = arm["test_difference"]
        words = difference(gap, about) + (", not distinguishable" if gap["verdict"] == "not distinguishable" else "")
        parts.append(f"{label(arm['name'])} {metric_interval(arm['test'], about)} ({words})")
    runs = baseline["test"]["n"]
    return f"final test {about['name']}: {'; '.join(parts)}" if runs else ""


def _cost(experiment: dict[str, Any], arms: list[dict[str, Any]]) -> str:
    baseline = next(arm for arm in arms if arm["name"] == experiment["baseline"])
    base = baseline["ms_per_step"]
    if not base:
        return ""
    parts = []
    for arm in arms:
        if arm is not baseline and arm["ms_per_step"]:
            within = f", {share(arm['norm_share'])} of it in norms" if arm["norm_share"] is not None else ""
            parts.append(f"{factor(arm['ms_per_step'] / base)}× as long with {label(arm['name'])}{within}")
    if not parts:
        return ""
    return f"a step takes {significant(base)} ms with {label(baseline['name'])} and {'; '.join(parts)}"


def _ranges(arms: list[dict[str, Any]]) -> str:
    known = [arm for arm in arms if arm["search"]]
    if not known:
        return ""
    parts = [f"{label(arm['name'])} {decades(arm['usable_rates'])}" for arm in known]
    return f"learning rates at which more than half of the search runs reach the target: {'; '.join(parts)}"


def _switches(every: list[tuple[Any, dict[str, Any]]]) -> str:
    """What strategies did; nothing where there is none."""
    parts = []
    for knob, arm in every:
        found = arm.get("switches")
        if not found:
            continue
        failed = f", {len(found['failed'])} failed ({found['failed'][0]['failed']})" if found["failed"] else ""
        if not found["switched"]:
            parts.append(f"{label(arm['name'])}{_at(knob)} never switched{failed}")
            continue
        first, last = found["first_step"], found["last_step"]
        when = f"at step {first}" if first == last else f"between steps {first} and {last}"
        moved = [found[f"moved_in_{mode}"] for mode in ("training", "evaluation")]
        jump = ""
        if None not in moved:
            jump = f" and moved the outputs by {significant(moved[0])} of their deviation in training, "
            jump += f"{significant(moved[1])} in evaluation"
        before, after = found["ms_per_step_before"], found["ms_per_step_after"]
        cost = f"; a step took {factor(after / before)}× as long after it" if before and after else ""
        parts.append(f"{label(arm['name'])}{_at(knob)} switched {when}{jump}{cost}{failed}")
    return "; ".join(parts)


def _bounds(every: list[tuple[Any, dict[str, Any]]]) -> str:
    edge = {"high": "highest", "low": "lowest"}
    hits = [
        f"{label(arm['name'])}{_at(knob)} (rate {rate(arm['lr'])}, the {edge[arm['bound_hit']]} tried)"
        for knob, arm in every
        if arm["bound_hit"]
    ]
    if not hits:
        return ""
    return (
        f"the best learning rate lies on the edge of the extended grid for {listing(hits)}; a better one may lie beyond"
    )


def _lost(every: list[tuple[Any, dict[str, Any]]]) -> str:
    parts = []
    for knob, arm in every:
        words = [f"{arm['runs'][key]} {key}" for key in ("diverged", "failed") if arm["runs"][key]]
        if words:
            parts.append(f"{label(arm['name'])}{_at(knob)}: {listing(words)} of {arm['runs']['planned']}")
    return f"final runs lost: {'; '.join(parts)}" if parts else ""


def _unreadable(problems: list[dict[str, str]]) -> str:
    return f"{len(problems)} cells could not be read and are left out; they are listed under Runs" if problems else ""


def _environments(experiment: dict[str, Any]) -> str:
    began, later = experiment.get("environment") or {}, experiment.get("continued_in", [])
    other = sorted({key for environment in later for key in environment if environment[key] != began.get(key)})
    return f"the runs come from {1 + len(later)} environments, which differ in {listing(other)}" if other else ""


def _at(knob: Any) -> str:
    return "" if knob is None else f" at {knob_value(knob)}"
