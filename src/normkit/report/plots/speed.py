"""The answer as a picture: the paired speed-up of every arm with its interval, against the line at one."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes

from normkit.report import numbers as n
from normkit.report.document import Figure
from normkit.report.labels import label
from normkit.report.plots.canvas import INK, MUTED, WIDE, Canvas, line_style, logarithmic

ROWS = (("steps_ratio", "steps", "o", 0.13), ("seconds_ratio", "time", "s", -0.13))


def speed_up(summary: dict[str, Any]) -> list[Figure]:
    """One figure; none when no arm has a ratio."""
    experiment = summary["experiment"]
    arms = [arm for arm in summary["points"][0]["arms"] if arm["name"] != experiment["baseline"]]
    if not any(arm["steps_ratio"]["value"] for arm in arms):
        return []
    canvas = Canvas(WIDE, 60 + 58 * len(arms))
    with canvas as axes:
        draw(axes, experiment, arms)
    title = f"How many times sooner than {label(experiment['baseline'])}"
    told = "; ".join(
        f"{label(arm['name'])}: steps {n.ratio(arm['steps_ratio'])}, time {n.ratio(arm['seconds_ratio'])}"
        for arm in arms
    )
    alternative = f"{title}, with 95 % intervals. {told}."
    return [Figure(canvas.svg("speed-up", title, alternative), title, alternative, wide=True)]


def draw(axes: Axes, experiment: dict[str, Any], arms: list[dict[str, Any]]) -> None:
    ends = [
        r[k]
        for arm in arms
        for r in (arm["steps_ratio"], arm["seconds_ratio"])
        for k in ("value", "low", "high")
        if r[k]
    ]
    left, right = min([*ends, 1]) / 1.25, max([*ends, 1]) * 1.6
    for index, arm in enumerate(arms):
        colour = line_style(experiment, arm["name"])["color"]
        for key, _, mark, shift in ROWS:
            result, y = arm[key], -index + shift
            if result["value"] is None:
                continue
            if result["low"] is not None:
                low, high = max(result["low"], left), result["high"] or right
                axes.plot([low, high], [y, y], color=colour, linewidth=2.2, alpha=0.75)
                if result["high"] is None:
                    axes.plot([right / 1.01], [y], linestyle="", marker=">", markersize=6, color=colour)
            point: dict[str, Any] = {"linestyle": "", "marker": mark, "markersize": 8, "markeredgecolor": INK}
            axes.plot([result["value"]], [y], color=colour, **point)
        if arm["steps_ratio"]["value"] is None:
            runs = arm["runs"]
            axes.annotate(
                f"no ratio: reaches the target in {runs['reached']} of {runs['finished']} runs",
                (1, -index),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                color=MUTED,
                fontsize=11.5,
            )
    axes.axvline(1, color=INK, linewidth=1.1)
    axes.set_xlim(left, right)
    axes.set_ylim(-len(arms) + 0.5, 0.5)
    axes.set_yticks([-index for index in range(len(arms))], [label(arm["name"]) for arm in arms], color=INK)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    logarithmic(axes, "x")
    axes.set_xlabel("times fewer steps (●) and times less time (■)")
