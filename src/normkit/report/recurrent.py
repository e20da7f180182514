"""Records of digits-sequence -> the tables and the answers of docs/what-works-where.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from normkit.report import numbers as n
from normkit.report.document import Table
from normkit.report.labels import label, sentence
from normkit.report.words import gain, speed_up

SMALL, WHOLE, LAYER, NONE = "batch+scale:0.1", "batch+scale:1", "layer", "none"
QUESTIONS = (
    (SMALL, WHOLE),
    (SMALL, LAYER),
    (WHOLE, LAYER),
    (f"{SMALL}+statistics:shared", SMALL),
    ("batch+where:input", LAYER),
    ("batch+where:input", NONE),
    (LAYER, NONE),
)
"""Who is held against whom."""
Pair = Mapping[str, Any]
Pairs = Mapping[tuple[str, str], Pair]
"""By arm and the one it is held against: ``test``, the paired difference of the metric; ``steps``, the paired ratio."""


def results(summary: Mapping[str, Any]) -> Table:
    """Every arm: the test metric as it is and with exact statistics, and the race."""
    about = summary["experiment"]["metric"]
    header = [
        *("", "rate", f"test {about['name']}", "with exact statistics", "steps to target", "reach target"),
        *("diverge", "ms per step"),
    ]
    rows = []
    for arm in summary["points"][0]["arms"]:
        exact, runs = arm["test_exact"], arm["runs"]
        rows.append(
            [
                f"`{arm['name']}`",
                n.rate(arm["lr"]),
                n.metric_interval(arm["test"], about),
                n.NOTHING if exact is None else n.metric_interval(exact, about),
                n.count(arm["steps_to_target"]["median"]),
                f"{runs['reached']} of {runs['finished']}",
                f"{runs['diverged']} of {runs['finished']}",
                n.significant(arm["ms_per_step"]),
            ]
        )
    return Table(header, rows, numeric=frozenset(range(1, len(header))))


def gradients(summary: Mapping[str, Any]) -> Table:
    """The gradient at the first time step over that at the last, behind the first, the middle and the last step."""
    arms = [arm for arm in summary["points"][0]["arms"] if arm.get("state_gradients")]
    steps = sorted({line["step"] for arm in arms for line in arm["state_gradients"]})
    rows = []
    for arm in arms:
        kept = {line["step"]: _kept(line["norms"]) for line in arm["state_gradients"]}
        rows.append([f"`{arm['name']}`", *(_share(kept.get(step)) for step in steps)])
    header = ["", *(f"behind step {step}" for step in steps)]
    return Table(header, rows, numeric=frozenset(range(1, len(header))))


def answers(summary: Mapping[str, Any], pairs: Pairs) -> list[str]:
    """The questions of the page, each with the numbers of this record, whatever they say."""
    return [sentence(text) for text in (*_compared(summary, pairs), *_gradient(summary))]


def _compared(summary: Mapping[str, Any], pairs: Pairs) -> Iterator[str]:
    about, arms = summary["experiment"], {arm["name"]: arm for arm in summary["points"][0]["arms"]}
    goal = n.target(about["target"], about["metric"])
    for name, other in QUESTIONS:
        if (name, other) not in pairs:
            continue
        pair = pairs[name, other]
        test = pair["test"]
        found = f"{test['verdict']} ({n.difference(dict(test), about['metric'])})"
        yield (
            f"**{sentence(label(name)).rstrip('.')} against {label(other)}**: test {about['metric']['name']} {found}; "
            f"{_race(pair['steps'], arms[name]['runs'], goal)}"
        )


def _race(result: Pair, runs: Mapping[str, int], goal: str) -> str:
    if result["verdict"] in ("faster", "slower", "one seed"):
        return f"{gain(dict(result), 'steps')} to {goal}"
    if result["verdict"] == "not distinguishable":
        return f"steps to {goal} not distinguishable ({speed_up(dict(result))})"
    return f"{goal} is reached in {runs['reached']} of {runs['finished']} runs only, so there is no ratio of steps"


def _gradient(summary: Mapping[str, Any]) -> Iterator[str]:
    """Of the arms that differ in the first scale, and the two that they are held against."""
    arms = {arm["name"]: arm for arm in summary["points"][0]["arms"] if arm.get("state_gradients")}
    asked = [name for name in (SMALL, WHOLE, LAYER, NONE) if name in arms]
    if asked:
        first = min(line["step"] for name in asked for line in arms[name]["state_gradients"])
        told = [f"{_share(_kept(_norms(arms[name], first)))} with {label(name)}" for name in asked]
        yield (
            f"**The gradient on its way back**: behind step {first} what reaches the first time step, as a share of "
            f"the gradient at the last one, is {', '.join(told)}"
        )


def _norms(arm: Mapping[str, Any], step: int) -> list[float | None]:
    return next((line["norms"] for line in arm["state_gradients"] if line["step"] == step), [])


def _kept(norms: list[float | None]) -> float | None:
    """First over last."""
    if not norms or norms[0] is None or not norms[-1]:
        return None
    return norms[0] / norms[-1]


def _share(value: float | None) -> str:
    return n.NOTHING if value is None else f"{value:.2g}"
