"""Heat maps: one row per layer, one column per sampled step, one scale for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import FuncFormatter, NullFormatter

from normkit.report.document import Figure
from normkit.report.plots.canvas import ARMS, WIDE, Canvas, plain

ROWS, COLUMNS = 64, 160
"""More layers or samples than these are thinned out evenly."""
TICKS = 8
NON_FINITE = ARMS[2]


def heat_map(
    title: str, unit: str, layers: Sequence[str], steps: Sequence[int], values: dict[tuple[str, int], float], name: str
) -> Figure:
    """Layer x step in one colour scale, logarithmic where the values spread over more than a decade.

    A missing value is blank; one that is not finite is orange, which the scale (cividis) has not.
    """
    every, rows, columns = len(layers), _thinned(layers, ROWS), _thinned(steps, COLUMNS)
    finite = [value for value in values.values() if math.isfinite(value)]
    grid = [[values.get((layer, step), math.nan) for step in columns] for layer in rows]
    broken = [
        (x, y) for y, layer in enumerate(rows) for x, step in enumerate(columns) if _broken(values.get((layer, step)))
    ]
    canvas = Canvas(WIDE, 90 + 13 * len(rows))
    with canvas as axes:
        shown = [[value if math.isfinite(value) else math.nan for value in row] for row in grid]
        image = axes.imshow(shown, aspect="auto", interpolation="nearest", cmap=_colours(), norm=_scale(finite))
        if broken:
            axes.plot(*zip(*broken, strict=True), linestyle="", marker="s", markersize=4, color=NON_FINITE)
        axes.set_yticks(range(len(rows)), [_short(layer) for layer in rows], fontsize=9)
        ticks = _thinned(range(len(columns)), TICKS)
        axes.set_xticks(ticks, [str(columns[tick]) for tick in ticks])
        axes.set_xlabel("optimizer step")
        axes.grid(visible=False)
        bar = canvas.figure.colorbar(image, ax=axes, label=unit or None, shrink=min(1, 220 / canvas.size[1] + 0.3))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(plain))
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
    told = _told(finite, broken, every, len(rows), unit)
    return Figure(canvas.svg(name, title, f"{title}. {told}"), title, f"{title}. {told}", wide=True)


def _thinned(items: Sequence[Any], most: int) -> list[Any]:
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _broken(value: float | None) -> bool:
    return value is not None and not math.isfinite(value)


def _short(name: str) -> str:
    """The end of a long name tells layers apart."""
    return name if len(name) <= 34 else f"…{name[-33:]}"


def _colours() -> Any:
    return colormaps["cividis"].with_extremes(bad=(0, 0, 0, 0))


def _scale(finite: Sequence[float]) -> Normalize:
    """Zeros of a logarithmic scale take its lowest colour."""
    positive = [value for value in finite if value > 0]
    if positive and min(finite) >= 0 and max(positive) > 10 * min(positive):
        return LogNorm(min(positive), max(positive), clip=True)
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    return Normalize(low, high if high > low else low + 1)


def _told(finite: Sequence[float], broken: Sequence[Any], every: int, rows: int, unit: str) -> str:
    parts = [f"{every} layers" + (f", {rows} of them shown" if rows < every else "")]
    if finite:
        parts.append(f"from {min(finite):.3g} to {max(finite):.3g} {unit}".rstrip())
    if broken:
        parts.append(f"{len(broken)} values are not finite (orange)")
    return "; ".join(parts) + "."
