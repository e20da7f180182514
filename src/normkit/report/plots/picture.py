"""One summary picture for a README: learning curves on the left, learning-rate sensitivity on the right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from normkit.report.plots.canvas import Canvas
from normkit.report.plots.learning import draw as draw_curves
from normkit.report.plots.rates import draw_steps


def draw(summary: dict[str, Any], path: Path) -> Path:
    """Write the picture of the first knob value; raises ValueError for an ending other than .png and .svg."""
    experiment, arms = summary["experiment"], summary["points"][0]["arms"]
    canvas = Canvas(980, 400, columns=2)
    with canvas as (left, right):
        draw_curves(left, experiment, arms, "step")
        draw_steps(right, experiment, [arm for arm in arms if arm["search"]])
        left.set_title("Learning curves: median and range of all seeds", loc="left", pad=18)
        right.set_title("Steps to the target at every learning rate tried", loc="left", pad=18)
        handles, names = left.get_legend_handles_labels()
        canvas.figure.legend(handles, names, loc="outside upper center", ncols=min(len(names) or 1, 5), frameon=False)
    return canvas.file(path)
