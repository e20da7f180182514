"""How the gradient fares on its way back through the time steps of a recurrent network."""

from __future__ import annotations

from typing import Any

from normkit.report import numbers as n
from normkit.report.document import Figure, Table
from normkit.report.labels import label
from normkit.report.plots.canvas import Canvas, line_style, logarithmic, marker

FEW = 9  # columns of the table beside a picture
MARKED = 30  # a curve of fewer points has them marked


def state_gradients(summary: dict[str, Any], point: dict[str, Any], name: str) -> list[Figure]:
    """One figure per training step at which it was measured, one curve per arm; all on one scale."""
    arms = [arm for arm in point["arms"] if arm.get("state_gradients")]
    if not arms:
        return []
    every = [value for arm in arms for line in arm["state_gradients"] for value in line["norms"] if value]
    figures = []
    for step in sorted({line["step"] for arm in arms for line in arm["state_gradients"]}):
        curves = {arm["name"]: norms for arm in arms if (norms := _at(arm, step))}
        canvas = Canvas()
        with canvas as axes:
            for arm, norms in curves.items():
                marks = {"marker": marker(summary["experiment"], arm), "markersize": 5} if len(norms) < MARKED else {}
                drawn = [value or float("nan") for value in norms]
                axes.plot(range(1, len(norms) + 1), drawn, **line_style(summary["experiment"], arm), **marks)
            if every:
                axes.set_ylim(min(every) / 1.5, max(every) * 1.5)
                logarithmic(axes, "y")
            axes.set_xlabel("time step")
            axes.set_ylabel("|dL/dh|")
        title = f"Gradient by time step, behind training step {step}"
        told = "; ".join(
            f"{label(arm)} {n.significant(norms[0])} at the first time step, {n.significant(norms[-1])} at the last"
            for arm, norms in curves.items()
        )
        svg = canvas.svg(f"{name}-{step}", title, f"{title}. {told}.")
        figures.append(Figure(svg, title, f"{title}. {told}.", _table(curves)))
    return figures


def _at(arm: dict[str, Any], step: int) -> list[float | None]:
    return next((line["norms"] for line in arm["state_gradients"] if line["step"] == step), [])


def _table(curves: dict[str, list[float | None]]) -> Table:
    last = max(map(len, curves.values())) - 1
    picks = sorted({round(i * last / (FEW - 1)) for i in range(FEW)})
    rows = [
        [label(arm), *(n.significant(norms[i]) if i < len(norms) else n.NOTHING for i in picks)]
        for arm, norms in curves.items()
    ]
    header = ["time step", *(str(i + 1) for i in picks)]
    return Table(header, rows, numeric=frozenset(range(1, len(header))), arms=list(curves))
