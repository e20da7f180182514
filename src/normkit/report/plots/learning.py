"""Learning curves: the metric on validation data by step and by seconds, with the range of all seeds."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes

from normkit.report import numbers as n
from normkit.report.document import Figure, Table
from normkit.report.labels import knob_value, knob_words, label
from normkit.report.plots.canvas import (
    INK,
    MUTED,
    Canvas,
    line_style,
    logarithmic,
    metric_label,
    percent,
)

AXES = {"step": "optimizer steps", "seconds": "seconds of training"}
STEPS_IN_TABLE = 9


def learning_curves(summary: dict[str, Any], point: dict[str, Any], name: str) -> list[Figure]:
    """Two figures, by step and by seconds, of all arms at one knob value; none when nothing was measured."""
    if not any(arm["curve"]["step"] for arm in point["arms"]):
        return []
    experiment = summary["experiment"]
    at = "" if point["knob"] is None else f", {knob_words(experiment)} {knob_value(point['knob'])}"
    figures = []
    for key, axis in AXES.items():
        canvas = Canvas()
        with canvas as axes:
            draw(axes, experiment, point["arms"], key)
        title = f"{metric_label(experiment['metric'], 'Validation')} by {axis}{at}"
        alternative = f"{title}. {_told(experiment, point['arms'], key)}"
        numbers = _table(experiment, point["arms"]) if key == "step" else None
        figures.append(Figure(canvas.svg(f"{name}-{key}", title, alternative), title, alternative, numbers))
    return figures


def draw(axes: Axes, experiment: dict[str, Any], arms: list[dict[str, Any]], key: str) -> None:
    """The curves of all arms into ``axes``: median line, band over the seeds, target, and where the median arrives."""
    about, goal = experiment["metric"], experiment["target"]
    for arm in arms:
        curve, style = arm["curve"], line_style(experiment, arm["name"])
        if not curve["step"]:
            continue
        axes.fill_between(curve[key], curve["low"], curve["high"], color=style["color"], alpha=0.14, linewidth=0)
        axes.plot(curve[key], curve["median"], label=label(arm["name"]), **style)
        ends = [(end[key], end["validation"]) for end in arm["divergences"] if end["step"] is not None]
        for x, y in ends:
            axes.plot([x], [y], linestyle="", marker="x", markersize=7, markeredgewidth=2, color=style["color"])
    axes.axhline(goal, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for arm in arms:
        arrival = arm["steps_to_target" if key == "step" else "seconds_to_target"]["median"]
        if arrival is not None:
            dot: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 7, "markeredgecolor": INK, "zorder": 5}
            axes.plot([arrival], [goal], color=line_style(experiment, arm["name"])["color"], **dot)
    _limits(axes, about, goal, arms)
    logarithmic(axes, "x")
    percent(axes, "y", about)
    axes.set_xlabel(AXES[key])
    axes.set_ylabel(metric_label(about, "validation"))
    axes.annotate(
        f"target {n.target(goal, about)}",
        (0.0, goal),
        xycoords=("axes fraction", "data"),
        xytext=(4, 4 if about["higher_is_better"] else -4),
        textcoords="offset points",
        va="bottom" if about["higher_is_better"] else "top",
        color=MUTED,
        fontsize=11,
    )


def _limits(axes: Axes, about: dict[str, Any], goal: float, arms: list[dict[str, Any]]) -> None:
    """From the worst median to the best seed: one run that explodes must not flatten all the others."""
    curves = [arm["curve"] for arm in arms if arm["curve"]["step"]]
    medians = [value for curve in curves for value in curve["median"]]
    best = [value for curve in curves for value in curve["high" if about["higher_is_better"] else "low"]]
    low, high = min([*medians, *best, goal]), max([*medians, *best, goal])
    pad = 0.04 * (high - low or 1)
    axes.set_ylim(low - pad, high + pad)


def _told(experiment: dict[str, Any], arms: list[dict[str, Any]], key: str) -> str:
    about, parts = experiment["metric"], []
    for arm in arms:
        race = arm["steps_to_target" if key == "step" else "seconds_to_target"]
        when = (
            "rarely or never"
            if race["median"] is None
            else f"after {n.significant(race['median'])} {'steps' if key == 'step' else 's'}"
        )
        last = f", ends at {n.metric(arm['curve']['median'][-1], about)}" if arm["curve"]["median"] else ""
        parts.append(f"{label(arm['name'])} reaches {n.target(experiment['target'], about)} {when}{last}")
    return "; ".join(parts) + "."


def _table(experiment: dict[str, Any], arms: list[dict[str, Any]]) -> Table:
    """The medians at a few steps, spread as on the logarithmic axis."""
    steps = sorted({step for arm in arms for step in arm["curve"]["step"]})
    last = len(steps) - 1
    picks = sorted({round((last + 1) ** (i / (STEPS_IN_TABLE - 1))) - 1 for i in range(STEPS_IN_TABLE)})
    chosen = [steps[i] for i in picks]
    rows = []
    for arm in arms:
        values = dict(zip(arm["curve"]["step"], arm["curve"]["median"], strict=True))
        rows.append([label(arm["name"]), *(n.metric(values.get(step), experiment["metric"]) for step in chosen)])
    header = ["median at step", *(str(step) for step in chosen)]
    return Table(header, rows, numeric=frozenset(range(1, len(header))), arms=[arm["name"] for arm in arms])
