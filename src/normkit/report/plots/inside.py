"""What happens inside: the input of one late unit over training, and the gradient's way through the layers."""

from __future__ import annotations

from typing import Any

from normkit.report import numbers as n
from normkit.report.document import Figure, Table
from normkit.report.labels import label
from normkit.report.plots.canvas import ARMS, WIDTH, Canvas, colours, line_style, logarithmic, marker

MANY_LAYERS = 8


def unit_percentiles(summary: dict[str, Any], point: dict[str, Any], name: str) -> list[Figure]:
    """One small figure per arm, all on the same scale (Ioffe & Szegedy 2015, figure 1)."""
    arms = [arm for arm in point["arms"] if arm["unit"]]
    if not arms:
        return []
    low = min(min(arm["unit"]["p15"]) for arm in arms)
    high = max(max(arm["unit"]["p85"]) for arm in arms)
    pad = 0.05 * (high - low or 1)
    figures = []
    for index, arm in enumerate(arms):
        unit, colour = arm["unit"], ARMS[colours(summary["experiment"])[arm["name"]]]
        canvas = Canvas(WIDTH, 230)
        with canvas as axes:
            axes.fill_between(unit["step"], unit["p15"], unit["p85"], color=colour, alpha=0.18, linewidth=0)
            for key, width in (("p15", 1.0), ("p50", 2.0), ("p85", 1.0)):
                axes.plot(unit["step"], unit[key], color=colour, linewidth=width)
            axes.set_ylim(low - pad, high + pad)
            _early_steps_wide(axes, unit["step"])
            axes.set_ylabel("input of the unit")
        title = f"{label(arm['name'])}: one late unit"
        told = (f"{_triple(unit, at)} at step {unit['step'][at]}" for at in (0, -1))
        alternative = f"{title} (module {unit['layer']}), percentiles 15, 50, 85: {', '.join(told)}."
        figures.append(Figure(canvas.svg(f"{name}-{index}", title, alternative), title, alternative))
    return figures


def _early_steps_wide(axes: Any, steps: list[int]) -> None:
    """Steps on a logarithmic axis, for most happens early; a sample before the first step stands at its left end."""
    first = next((step for step in steps if step > 0), 1)
    decades = [10**power for power in range(9) if first <= 10**power <= steps[-1]]
    if steps[0] > 0:
        axes.set_xscale("log")
        axes.set_xticks(decades, [f"{step:g}" for step in decades])
    else:
        axes.set_xscale("symlog", linthresh=first, linscale=0.4)
        axes.set_xticks([0, *decades], ["0", *(f"{step:g}" for step in decades)])
    axes.set_xlim(steps[0], max(steps[-1], first))
    axes.minorticks_off()
    axes.set_xlabel("optimizer steps")


def _triple(unit: dict[str, Any], at: int) -> str:
    return ", ".join(n.significant(unit[key][at]) for key in ("p15", "p50", "p85"))


def gradient_norms(summary: dict[str, Any], point: dict[str, Any], name: str) -> list[Figure]:
    """Two figures: every layer's gradient norm at the first and at the last sample."""
    arms = [arm for arm in point["arms"] if arm["gradient_norms"]]
    if not arms:
        return []
    every = [
        value for arm in arms for when in ("start", "end") for value in arm["gradient_norms"][when]["norms"] if value
    ]
    figures = []
    for when, words in (("start", "at the start"), ("end", "at the end")):
        canvas = Canvas()
        with canvas as axes:
            for arm in arms:
                norms = [value or float("nan") for value in arm["gradient_norms"][when]["norms"]]
                style = line_style(summary["experiment"], arm["name"])
                marks = (
                    {"marker": marker(summary["experiment"], arm["name"]), "markersize": 5} if len(norms) < 30 else {}
                )
                axes.plot(range(1, len(norms) + 1), norms, **style, **marks)
            if every:
                axes.set_ylim(min(every) / 1.5, max(every) * 1.5)
                logarithmic(axes, "y")
            _layer_ticks(axes, arms[0]["gradient_norms"]["layers"])
            axes.set_ylabel("gradient norm")
        title = f"Gradient norm by layer {words} of training"
        told = "; ".join(_first_and_last(arm, when) for arm in arms)
        figures.append(
            Figure(
                canvas.svg(f"{name}-{when}", title, f"{title}. {told}."), title, f"{title}. {told}.", _table(arms, when)
            )
        )
    return figures


def _first_and_last(arm: dict[str, Any], when: str) -> str:
    norms = arm["gradient_norms"][when]["norms"]
    return f"{label(arm['name'])} {n.significant(norms[0])} in the first layer, {n.significant(norms[-1])} in the last"


def _layer_ticks(axes: Any, layers: list[str]) -> None:
    if len(layers) <= MANY_LAYERS:
        axes.set_xticks(range(1, len(layers) + 1), [str(i) for i in range(1, len(layers) + 1)])
    axes.set_xlabel("weight matrix, input to output")


def _table(arms: list[dict[str, Any]], when: str) -> Table:
    layers = arms[0]["gradient_norms"]["layers"]
    step = max(1, len(layers) // MANY_LAYERS)
    picks = sorted({*range(0, len(layers), step), len(layers) - 1})
    rows = []
    for arm in arms:
        norms = arm["gradient_norms"][when]["norms"]
        rows.append([label(arm["name"]), *(n.significant(norms[i] if i < len(norms) else None) for i in picks)])
    header = ["arm", *(layers[i] for i in picks)]
    return Table(header, rows, numeric=frozenset(range(1, len(header))), arms=[arm["name"] for arm in arms])
