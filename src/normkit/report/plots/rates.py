"""Learning-rate sensitivity, the fairness plot: what each arm does at every rate of the search, chosen one marked."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes

from normkit.report import numbers as n
from normkit.report.document import Figure, Table
from normkit.report.labels import label
from normkit.report.plots.canvas import (
    INK,
    MUTED,
    PAPER,
    WIDE,
    Canvas,
    line_style,
    logarithmic,
    marker,
    metric_label,
    percent,
)

Arm = dict[str, Any]


def sensitivity(summary: dict[str, Any], point: dict[str, Any], name: str) -> list[Figure]:
    """Steps to the target, best validation metric, and the usable range, each against the learning rate."""
    arms = [arm for arm in point["arms"] if any(row["best_validation"] is not None for row in arm["search"])]
    if not arms:
        return []
    experiment = summary["experiment"]
    told = "; ".join(
        f"{label(arm['name'])} {n.decades(arm['usable_rates'])}, chosen {n.rate(arm['lr'])}" for arm in arms
    )
    best = f"Best {metric_label(experiment['metric'], 'validation')} by learning rate"
    panels = (
        ("steps", "Steps to the target by learning rate", draw_steps, Canvas()),
        ("best", best, draw_best, Canvas()),
        ("range", "Where each arm can be used", draw_ranges, Canvas(WIDE, 50 + 46 * len(arms))),
    )
    figures = []
    for key, title, draw, canvas in panels:
        with canvas as axes:
            draw(axes, experiment, arms)
        alternative = f"{title}. Usable learning rates: {told}."
        numbers = _table(arms, experiment) if key == "range" else None
        svg = canvas.svg(f"{name}-{key}", title, alternative)
        figures.append(Figure(svg, title, alternative, numbers, wide=key == "range"))
    return figures


def draw_steps(axes: Axes, experiment: dict[str, Any], arms: list[Arm]) -> None:
    """Median steps to the target; rates at which most runs do not arrive stand in a strip above, one row per arm."""
    known = [row["steps_to_target"] for arm in arms for row in arm["search"] if row["steps_to_target"]]
    low, high = min(known, default=1), max(known, default=experiment["steps"])
    spacing = max(1.15, (high / low) ** 0.08)
    floor, strip = low / spacing, high * spacing**1.5  # the strip's rows are as far apart on any range of steps
    axes.set(xscale="log", yscale="log")
    for index, arm in enumerate(arms):
        style, mark = line_style(experiment, arm["name"]), marker(experiment, arm["name"])
        y = strip * spacing ** (len(arms) - index)
        reached = [row for row in arm["search"] if row["steps_to_target"]]
        rates, steps = [row["lr"] for row in reached], [row["steps_to_target"] for row in reached]
        axes.plot(rates, steps, marker=mark, markersize=5, label=label(arm["name"]), **style)
        for row in arm["search"]:
            if not row["steps_to_target"]:
                _missed(axes, row, y, style["color"])
            if row["lr"] == arm["lr"]:
                _ring(axes, row["lr"], row["steps_to_target"] or y)
    axes.axhline(strip, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
    ceiling = strip * spacing ** (len(arms) + 0.8)
    axes.set_ylim(floor, ceiling)
    logarithmic(axes, "x")
    logarithmic(axes, "y")
    axes.set_yticks([tick for tick in axes.get_yticks() if floor <= tick < strip])
    axes.set_ylim(floor, ceiling)
    axes.text(1, 1.01, "○ not reached   × diverged", transform=axes.transAxes, ha="right", color=MUTED, fontsize=11)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("steps to target")


def draw_best(axes: Axes, experiment: dict[str, Any], arms: list[Arm]) -> None:
    """Best validation metric of each rate, median over the search seeds; × where most runs diverged."""
    for arm in arms:
        style, mark = line_style(experiment, arm["name"]), marker(experiment, arm["name"])
        rows = [row for row in arm["search"] if row["best_validation"] is not None]
        rates, best = [row["lr"] for row in rows], [row["best_validation"] for row in rows]
        kept = [index for index, row in enumerate(rows) if not _lost(row)]
        axes.plot(rates, best, label=label(arm["name"]), marker=mark, markersize=5, markevery=kept, **style)
        for row in rows:
            if _lost(row):
                _missed(axes, row, row["best_validation"], style["color"])
            if row["lr"] == arm["lr"]:
                _ring(axes, row["lr"], row["best_validation"])
    axes.axhline(experiment["target"], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    _without_explosions(axes, experiment, arms)
    logarithmic(axes, "x")
    percent(axes, "y", experiment["metric"])
    axes.set_xlabel("learning rate")
    axes.set_ylabel(metric_label(experiment["metric"], "best validation"))


def _without_explosions(axes: Axes, experiment: dict[str, Any], arms: list[Arm]) -> None:
    """Where lower is better, a rate that blew up must not flatten the others: the axis ends where they do."""
    if experiment["metric"]["higher_is_better"]:
        return
    held = [row["best_validation"] for arm in arms for row in arm["search"] if not _lost(row)]
    known = [value for value in held if value is not None]
    if known:
        low, high = min([*known, experiment["target"]]), max([*known, experiment["target"]])
        axes.set_ylim(low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1))


def _lost(row: dict[str, Any]) -> bool:
    return 2 * row["diverged"] > row["seeds"]


def _missed(axes: Axes, row: dict[str, Any], y: float, colour: str) -> None:
    point: dict[str, Any] = {
        "linestyle": "",
        "marker": "x" if _lost(row) else "o",
        "markersize": 5.5,
        "markeredgewidth": 1.5,
    }
    axes.plot([row["lr"]], [y], color=colour, markerfacecolor="none", **point)


def _ring(axes: Axes, x: float, y: float) -> None:
    """The rate that the arm was then run with."""
    axes.plot([x], [y], linestyle="", marker="o", markersize=11, markerfacecolor="none", color=INK, markeredgewidth=1.3)


def draw_ranges(axes: Axes, experiment: dict[str, Any], arms: list[Arm]) -> None:
    """Thick: most search runs reach the target. Thin: most do not diverge. Ticks: rates tried. Ring: chosen."""
    for index, arm in enumerate(arms):
        y, colour = -index, line_style(experiment, arm["name"])["color"]
        tried = [row["lr"] for row in arm["search"]]
        axes.plot(tried, [y] * len(tried), linestyle="", marker="|", markersize=8, color=MUTED, markeredgewidth=0.8)
        for key, width in (("stable_rates", 2.0), ("usable_rates", 9.0)):
            if arm[key]:
                ends = [arm[key]["low"] / 1.06, arm[key]["high"] * 1.06]
                axes.plot(ends, [y, y], color=colour, linewidth=width, solid_capstyle="butt")
        if arm["lr"]:
            ring: dict[str, Any] = {
                "linestyle": "",
                "marker": "o",
                "markersize": 8,
                "markeredgewidth": 1.3,
                "zorder": 5,
            }
            axes.plot([arm["lr"]], [y], color=INK, markerfacecolor=PAPER, **ring)
        words = f"{label(arm['name'])}: {n.decades(arm['usable_rates'])}"
        axes.text(0, y + 0.22, words, transform=axes.get_yaxis_transform(), va="bottom", color=INK, fontsize=11.5)
    axes.set_ylim(-len(arms) + 0.5, 0.75)
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    logarithmic(axes, "x")
    axes.set_xlabel("learning rate")


def _table(arms: list[Arm], experiment: dict[str, Any]) -> Table:
    header = [
        "arm",
        "learning rate",
        "reach target",
        "diverged",
        "steps to target",
        f"best validation {experiment['metric']['name']}",
    ]
    rows, names = [], []
    for arm in arms:
        for row in arm["search"]:
            chosen = " (chosen)" if row["lr"] == arm["lr"] else ""
            rows.append(
                [
                    label(arm["name"]),
                    n.rate(row["lr"]) + chosen,
                    f"{row['reached']} of {row['seeds']}",
                    n.count(row["diverged"]),
                    n.count(row["steps_to_target"]),
                    n.metric(row["best_validation"], experiment["metric"]),
                ]
            )
            names.append(arm["name"])
    return Table(header, rows, numeric=frozenset(range(1, 6)), arms=names)
