"""Curves over the steps of a run: sparklines, the three losses, the size of updates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from normkit.report.document import Figure, Table
from normkit.report.plots.canvas import ARMS, DASHES, INK, MUTED, WIDE, Canvas, logarithmic

Points = Sequence[tuple[int, float]]
MOST = 500
"""Points of a curve that are drawn."""


def sparkline(points: Points, title: str, name: str, threshold: float | None = None) -> Figure:
    """A small curve with its ends in numbers, and the threshold where there is one."""
    points = _finite(points)
    canvas = Canvas(330, 76)
    with canvas as axes:
        axes.plot(*zip(*points, strict=True), color=ARMS[1], linewidth=1.6)
        axes.plot(*points[-1], color=ARMS[1], marker="o", markersize=4)
        if threshold is not None and math.isfinite(threshold):
            axes.axhline(threshold, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_yticks([])
        axes.set_xticks([points[0][0], points[-1][0]])
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
    told = f"{title}: {points[0][1]:.3g} at step {points[0][0]}, {points[-1][1]:.3g} at step {points[-1][0]}"
    line = "" if threshold is None else f"; dashed: the threshold {threshold:.3g}"
    return Figure(canvas.svg(name, title, told), told + line, told + line)


def curves(
    series: Mapping[str, Points], title: str, label: str, name: str, *, line: tuple[float, str] | None = None
) -> Figure:
    """Named curves in one picture, each with a colour and a dash of its own; logarithmic where they spread."""
    drawn = {words: _thinned(_finite(points)) for words, points in series.items() if _finite(points)}
    canvas = Canvas(WIDE, 300)
    with canvas as axes:
        for index, (words, points) in enumerate(drawn.items()):
            marks = {"marker": "o", "markersize": 4} if len(points) < 30 else {}
            style = {"color": ARMS[1 + index % (len(ARMS) - 1)], "linestyle": DASHES[index % len(DASHES)]}
            axes.plot(*zip(*points, strict=True), label=words, **style, **marks)
        _decorate(axes, drawn, label, line)
    told = "; ".join(
        f"{words} {p[0][1]:.3g} at step {p[0][0]}, {p[-1][1]:.3g} at {p[-1][0]}" for words, p in drawn.items()
    )
    return Figure(canvas.svg(name, title, f"{title}. {told}."), title, f"{title}. {told}.", _numbers(drawn), wide=True)


def band(
    series: Mapping[str, Points], title: str, label: str, name: str, *, line: tuple[float, str] | None = None
) -> Figure:
    """Many curves as their range and median, with the highest and the lowest at the end by name."""
    by_step: dict[int, list[float]] = {}
    for points in series.values():
        for step, value in _finite(points):
            by_step.setdefault(step, []).append(value)
    steps = sorted(by_step)
    rows = [sorted(by_step[step]) for step in steps]
    middle = [row[len(row) // 2] for row in rows]
    canvas = Canvas(WIDE, 300)
    with canvas as axes:
        axes.fill_between(
            steps, [row[0] for row in rows], [row[-1] for row in rows], color=ARMS[1], alpha=0.16, linewidth=0
        )
        axes.plot(steps, middle, color=ARMS[1], label="median of the layers")
        for (words, value), dash in zip(_ends(series), DASHES[1:], strict=False):
            points = _thinned(_finite(series[words]))
            axes.plot(
                *zip(*points, strict=True), color=ARMS[2], linestyle=dash, linewidth=1.2, label=f"{words}: {value:.2g}"
            )
        _decorate(axes, {"": list(zip(steps, middle, strict=True))}, label, line, log=True)
    told = f"median {middle[0]:.3g} at step {steps[0]}, {middle[-1]:.3g} at step {steps[-1]}; at the end " + ", ".join(
        f"{words} {value:.3g}" for words, value in _ends(series)
    )
    return Figure(canvas.svg(name, title, f"{title}. {told}."), title, f"{title}. {told}.", wide=True)


def _ends(series: Mapping[str, Points]) -> list[tuple[str, float]]:
    """Who is highest and who is lowest at the end."""
    last = sorted(((words, _finite(p)[-1][1]) for words, p in series.items() if _finite(p)), key=lambda pair: pair[1])
    return [last[-1], last[0]] if len(last) > 1 else last


def _decorate(
    axes: Axes, drawn: Mapping[str, Points], label: str, line: tuple[float, str] | None, log: bool | None = None
) -> None:
    values = [value for points in drawn.values() for _, value in points]
    positive = bool(values) and min(values) > 0
    if positive and (log or max(values) > 30 * min(values)):
        logarithmic(axes, "y")
    if line is not None:
        axes.axhline(line[0], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        spot: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "xytext": (4, 4), "textcoords": "offset points"}
        axes.annotate(line[1], (0.0, line[0]), color=MUTED, fontsize=11, **spot)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    axes.legend(frameon=False, fontsize=10, labelcolor=INK, loc="best")


def _finite(points: Points) -> list[tuple[int, float]]:
    return [(step, value) for step, value in points if math.isfinite(value)]


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    if len(points) <= MOST:
        return points
    return [points[round(i * (len(points) - 1) / (MOST - 1))] for i in range(MOST)]


def _numbers(drawn: Mapping[str, Points]) -> Table:
    """The curves at nine steps at most."""
    steps = sorted({step for points in drawn.values() for step, _ in points})
    chosen = steps if len(steps) <= 9 else [steps[round(i * (len(steps) - 1) / 8)] for i in range(9)]
    rows = []
    for words, points in drawn.items():
        at = dict(points)
        rows.append([words, *(f"{at[step]:.4g}" if step in at else "–" for step in chosen)])
    return Table(["at step", *map(str, chosen)], rows, numeric=frozenset(range(1, len(chosen) + 1)))
