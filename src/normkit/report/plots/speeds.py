"""The benchmark as a picture: how many times as fast as torch, a dot per shape and a large one for their mean."""

from __future__ import annotations

import math
import statistics

from normkit.report import numbers as n
from normkit.report.plots.canvas import ARMS, INK, WIDTH, Canvas, logarithmic

SERIES = (("normkit", ARMS[1], 0.12), ("torch.compile", ARMS[2], -0.12))
"""Implementation, colour, and how far above the middle of its row."""


def draw(rows: dict[str, dict[str, list[float]]]) -> tuple[Canvas, list[str]]:
    """Row -> implementation -> speed-ups on all shapes; the drawing, and what it says in words."""
    canvas, told = Canvas(2 * WIDTH, 70 + 26 * len(rows)), []
    with canvas as axes:
        for index, (row, by_name) in enumerate(rows.items()):
            for name, colour, shift in SERIES:
                values = by_name.get(name)
                if not values:
                    continue
                mean, y = math.exp(statistics.fmean(map(math.log, values))), shift - index
                axes.plot(values, [y] * len(values), "o", color=colour, alpha=0.45, markersize=4)
                axes.plot([mean], [y], "o", color=colour, markeredgecolor=INK, markersize=8)
                told.append(f"{row} {name} {n.factor(mean)}×")
        axes.axvline(1, color=INK, linewidth=1.1)
        axes.set_ylim(0.6 - len(rows), 0.6)
        axes.set_yticks([-index for index in range(len(rows))], list(rows), color=INK)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=True, axis="x")
        axes.grid(visible=False, axis="y")
        logarithmic(axes, "x")
        axes.set_xlabel("times as fast as torch, forward and backward (blue: normkit, orange: torch.compile)")
    return canvas, told
