"""One summary picture for a README: learning curves on the left, learning-rate sensitivity on the right."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib

from normkit.report.plots.canvas import STYLE, Canvas
from normkit.report.plots.learning import draw as draw_curves
from normkit.report.plots.rates import draw_steps
from normkit.vocabulary.record import write_atomically

FORMATS = (".png", ".svg")


def draw(summary: dict[str, Any], path: Path) -> Path:
    """Write the picture of the first knob value; raises ValueError for an ending other than .png and .svg."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(
            f"{path}: a picture is written as {' or '.join(FORMATS)}, not as {path.suffix or 'no ending'!r}"
        )
    experiment, arms = summary["experiment"], summary["points"][0]["arms"]
    canvas = Canvas(980, 400, columns=2)
    with canvas as (left, right):
        draw_curves(left, experiment, arms, "step")
        draw_steps(right, experiment, [arm for arm in arms if arm["search"]])
        left.set_title("Learning curves: median and range of all seeds", loc="left", pad=18)
        right.set_title("Steps to the target at every learning rate tried", loc="left", pad=18)
        handles, names = left.get_legend_handles_labels()
        canvas.figure.legend(handles, names, loc="outside upper center", ncols=min(len(names) or 1, 5), frameon=False)
    buffer = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if path.suffix.lower() == ".svg" else {"Software": None}
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": "picture", "svg.fonttype": "path"}):
        canvas.figure.savefig(buffer, format=path.suffix[1:].lower(), dpi=144, facecolor="white", metadata=metadata)
    write_atomically(path, buffer.getvalue())
    return path
