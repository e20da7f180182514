"""What a step costs, and how much of it is spent in normalization layers."""

from __future__ import annotations

from typing import Any

from normkit.report import numbers as n
from normkit.report.document import Figure
from normkit.report.labels import label
from normkit.report.plots.canvas import INK, WIDE, Canvas, line_style


def step_cost(summary: dict[str, Any], point: dict[str, Any], name: str) -> list[Figure]:
    """One bar per arm: milliseconds of a step, the part in norms filled."""
    arms = [arm for arm in point["arms"] if arm["ms_per_step"]]
    if not arms:
        return []
    canvas = Canvas(WIDE, 56 + 44 * len(arms))
    with canvas as axes:
        for index, arm in enumerate(arms):
            whole, part = arm["ms_per_step"], (arm["norm_share"] or 0) * arm["ms_per_step"]
            colour = line_style(summary["experiment"], arm["name"])["color"]
            axes.barh(-index, whole, height=0.55, color=colour, alpha=0.3)
            axes.barh(-index, part, height=0.55, color=colour)
            text = f"{n.significant(whole)} ms" + (f", {n.share(arm['norm_share'])} in norms" if part else "")
            axes.annotate(
                text, (whole, -index), xytext=(6, 0), textcoords="offset points", va="center", color=INK, fontsize=11.5
            )
        axes.set_xlim(0, 1.28 * max(arm["ms_per_step"] for arm in arms))
        axes.set_yticks([-index for index in range(len(arms))], [label(arm["name"]) for arm in arms], color=INK)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=True, axis="x")
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("milliseconds per optimizer step (dark: in normalization layers)")
    title = "What a step costs"
    told = "; ".join(
        f"{label(arm['name'])} {n.significant(arm['ms_per_step'])} ms, {n.share(arm['norm_share'])} in norms"
        for arm in arms
    )
    return [Figure(canvas.svg(name, title, f"{title}. {told}."), title, f"{title}. {told}.", wide=True)]
