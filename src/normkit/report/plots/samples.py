"""Generated samples over training: one row per arm, one column per moment, and what is real at the bottom."""

from __future__ import annotations

import base64
import math
import textwrap
from typing import Any

from normkit.report.document import Figure
from normkit.report.labels import label
from normkit.report.plots.canvas import INK, WIDE, Canvas

GAP = 3
"""Pixels between two pictures."""
LONGEST = 28
"""Letters in a line of an arm's name."""
BLANK = math.nan
Pixels = list[list[float]]


def over_training(summary: dict[str, Any]) -> Figure:
    """One mosaic of all pictures: the columns are moments, later to the right."""
    kept = [(arm["name"], arm["pictures"]) for arm in summary["points"][0]["arms"] if arm.get("pictures")]
    steps = sorted({step for _, pictures in kept for step, _ in pictures["at"]})
    rows = [
        (textwrap.fill(label(name), LONGEST), [dict(pictures["at"]).get(step) for step in steps])
        for name, pictures in kept
    ]
    rows.append(("real", [kept[0][1]["real"]] * len(steps)))
    side = math.isqrt(len(base64.b64decode(kept[0][1]["real"])))
    whole: Pixels = []
    for _, pictures in rows:
        whole += _row([_pixels(picture, side) for picture in pictures], side)
    canvas = Canvas(WIDE, 60 + 60 * len(rows))
    with canvas as axes:
        axes.imshow(whole, cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="equal")
        middle = lambda place: place * (side + GAP) + side / 2
        axes.set_yticks([middle(place) for place in range(len(rows))], [name for name, _ in rows], color=INK)
        axes.set_xticks([middle(place) for place in range(len(steps))], [str(step) for step in steps])
        axes.set_xlabel("optimizer step")
        axes.tick_params(length=0)
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
    title = "Generated samples over training"
    told = f"{title}. {len(kept)} arms at the steps {', '.join(map(str, steps))}, and real samples below."
    return Figure(canvas.svg("samples", title, told), title, told, wide=True)


def _pixels(picture: str | None, side: int) -> Pixels:
    """One picture; blank where the run had ended before."""
    if picture is None:
        return [[BLANK] * side] * side
    grey = base64.b64decode(picture)
    return [[float(value) for value in grey[row * side : (row + 1) * side]] for row in range(side)]


def _row(pictures: list[Pixels], side: int) -> Pixels:
    """Pictures side by side, with a gap behind each and below all."""
    lines = [[value for picture in pictures for value in (*picture[row], *[BLANK] * GAP)] for row in range(side)]
    return [*lines, *[[BLANK] * len(lines[0])] * GAP]
