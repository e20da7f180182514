"""One summary picture for a README: of an experiment its learning curves and rates, of a sweep the metric along it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from normkit.report.labels import knob_words, label
from normkit.report.plots.canvas import Canvas
from normkit.report.plots.learning import draw as draw_curves
from normkit.report.plots.rates import draw_steps
from normkit.report.plots.sweep import draw_test

WIDTH, LINE = 980, 20
"""Pixels: of the picture, and of a line of its legend."""


def draw(summary: dict[str, Any], path: Path) -> Path:
    """Write the picture; raises ValueError for an ending other than .png and .svg."""
    experiment, arms = summary["experiment"], summary["points"][0]["arms"]
    columns, rows = _legend([label(arm["name"]) for arm in arms])
    canvas = Canvas(WIDTH, 400 + LINE * max(0, rows - 2), columns=2)
    with canvas as (left, right):
        if experiment.get("sweep"):
            _sweep(canvas, left, right, summary)
            return canvas.file(path)
        draw_curves(left, experiment, arms, "step")
        draw_steps(right, experiment, [arm for arm in arms if arm["search"]])
        left.set_title("Learning curves: median and range of all seeds", loc="left", pad=18)
        right.set_title("Steps to the target at every learning rate tried", loc="left", pad=18)
        handles, names = left.get_legend_handles_labels()
        canvas.figure.legend(handles, names, loc="outside upper center", ncols=columns, frameon=False)
    return canvas.file(path)


def _legend(names: list[str]) -> tuple[int, int]:
    """Columns and rows of a legend that is no wider than the picture: a name takes about 8 pixels per letter."""
    longest = 60 + 8 * max(map(len, names), default=0)
    columns = max(1, min(len(names) or 1, 5, WIDTH // longest))
    return columns, -(-len(names) // columns)


def _sweep(canvas: Canvas, left: Any, right: Any, summary: dict[str, Any]) -> None:
    """The test metric along the knob; on the right with statistics computed anew over the training set."""
    about, knob = summary["experiment"]["metric"], knob_words(summary["experiment"])
    draw_test(left, summary, exact=False)
    draw_test(right, summary, exact=True)
    low, high = zip(left.get_ylim(), right.get_ylim(), strict=True)
    for axes in (left, right):
        axes.set_ylim(min(low), max(high))
    left.set_title(f"Test {about['name']} along {knob}: running statistics", loc="left", pad=18)
    right.set_title("The same networks: exact statistics", loc="left", pad=18)
    names = [label(arm["name"]) for arm in summary["experiment"]["arms"]]
    canvas.figure.legend(left.get_lines()[: len(names)], names, loc="outside upper center", ncols=3, frameon=False)
