"""The answer of a sweep in words: where along the knob an arm helps, where it cannot be told, where it hurts."""

from __future__ import annotations

from typing import Any

from normkit.report.labels import knob_value, knob_words, label, listing, sentence
from normkit.report.numbers import factor, target

ORDER = ("faster", "slower", "not distinguishable", "one seed", "rarely reached", "no pairs")
STEPS = {"faster": "fewer steps", "slower": "more steps"}
TIME = {"faster": "less time", "slower": "more time"}


def sweep_answer(summary: dict[str, Any]) -> str:
    """One sentence per arm: its paired ratio to the baseline along the knob."""
    experiment, points = summary["experiment"], summary["points"]
    knob, baseline = knob_words(experiment), experiment["baseline"]
    than, goal = label(baseline), target(experiment["target"], experiment["metric"])
    names = [arm["name"] for arm in points[0]["arms"] if arm["name"] != baseline]
    sentences: list[str] = []
    for name in names:
        versus = f"{label(name)} against {than} along {knob}" if not sentences else label(name)
        row = [(point["knob"], next(arm for arm in point["arms"] if arm["name"] == name)) for point in points]
        steps = _along([(value, arm["steps_ratio"]) for value, arm in row], STEPS, goal)
        time = _along([(value, arm["seconds_ratio"]) for value, arm in row], TIME, goal, arrivals=False)
        text = f"{versus}: {steps}" + (f"; by the clock {time}" if time else "")
        sentences.append(sentence(text) if sentences else f"{text}.")
    if not sentences:
        return f"{than} alone along {knob}: there is no second arm to compare it with."
    return " ".join(sentences)


def _along(row: list[tuple[Any, dict[str, Any]]], units: dict[str, str], goal: str, arrivals: bool = True) -> str:
    parts = []
    for verdict in ORDER:
        at = [(value, result) for value, result in row if result["verdict"] == verdict]
        if not at or (not arrivals and verdict in ("rarely reached", "no pairs")):  # the steps have said it
            continue
        where = _stretches([value for value, _ in row], [value for value, _ in at])
        parts.append(_part(verdict, where, [result for _, result in at], units, goal))
    return ", ".join(parts)


def _part(verdict: str, where: str, results: list[dict[str, Any]], units: dict[str, str], goal: str) -> str:
    if verdict in units:
        values = [r["value"] if verdict == "faster" else 1 / r["value"] for r in results if r["value"]]
        return f"{_spread(values)}{units[verdict]} at {where}"
    if verdict == "one seed":
        return f"one seed only at {where} (speed-up {_spread([r['value'] for r in results if r['value']]).strip()})"
    if verdict == "rarely reached":
        return f"reaches {goal} in half of the runs or fewer at {where}"
    return f"no finished pair at {where}" if verdict == "no pairs" else f"not distinguishable at {where}"


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    low, high = factor(min(values)), factor(max(values))
    return f"{low}× " if low == high else f"{low}× to {high}× "


def _stretches(values: list[Any], chosen: list[Any]) -> str:
    """Neighbouring knob values read as a range: "2, 8 to 64 and 256"."""
    groups: list[list[Any]] = []
    for value in values:
        if value not in chosen:
            groups.append([])
        elif groups and groups[-1]:
            groups[-1].append(value)
        else:
            groups.append([value])
    names = [(knob_value(g[0]), knob_value(g[-1]), len(g)) for g in groups if g]
    return listing([a if n == 1 else f"{a} and {b}" if n == 2 else f"{a} to {b}" for a, b, n in names])
