"""A sweep: one curve per arm over the knob, with intervals, for every quantity that the arms have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes

from normkit.report import numbers as n
from normkit.report.document import Figure
from normkit.report.labels import knob_value, knob_words, label
from normkit.report.plots.canvas import INK, PAPER, Canvas, line_style, logarithmic, marker, metric_label, percent

RACES = ("sweep-steps", "sweep-seconds")
Triple = tuple[float | None, float | None, float | None]
Read = Callable[[dict[str, Any]], Triple]


def _race(key: str) -> Read:
    return lambda arm: (arm[key]["median"], arm[key]["low"], arm[key]["high"])


def _ratio(key: str) -> Read:
    def read(arm: dict[str, Any]) -> Triple:
        result = arm.get(key) or {"value": None, "low": None, "high": None}
        return result["value"], result["low"], result["high"]

    return read


def _variance(arm: dict[str, Any]) -> Triple:
    known = sorted(value for value in (arm["variance_ratio"] or {}).values() if value is not None)
    return (known[len(known) // 2], known[0], known[-1]) if known else (None, None, None)


def _test(arm: dict[str, Any]) -> Triple:
    return arm["test"]["mean"], arm["test"]["low"], arm["test"]["high"]


def _exact(arm: dict[str, Any]) -> Triple:
    """With statistics computed anew; an arm without running statistics is what it is."""
    found = arm["test"] if arm.get("test_exact") is None else arm["test_exact"]
    return found["mean"], found["low"], found["high"]


def over_the_knob(summary: dict[str, Any]) -> list[Figure]:
    """The figures that have something to show, in the order of the page."""
    about = summary["experiment"]["metric"]
    than = label(summary["experiment"]["baseline"])
    panels: list[tuple[str, str, str, Read, str]] = [
        ("sweep-steps", "Steps to the target", "steps to target", _race("steps_to_target"), "log"),
        ("sweep-seconds", "Seconds to the target", "seconds to target", _race("seconds_to_target"), "log"),
        ("sweep-fewer", f"Times fewer steps than {than}", "times fewer steps", _ratio("steps_ratio"), "ratio"),
        ("sweep-less", f"Times less time than {than}", "times less time", _ratio("seconds_ratio"), "ratio"),
        (
            "sweep-test",
            metric_label(about, "Test"),
            metric_label(about, "test"),
            _test,
            "metric",
        ),
        (
            "sweep-exact",
            f"{metric_label(about, 'Test')}, exact statistics",
            metric_label(about, "test"),
            _exact,
            "metric",
        ),
        ("sweep-cost", "Milliseconds per step", "ms per step", lambda arm: (arm["ms_per_step"], None, None), "zero"),
        (
            "sweep-dead",
            "Dead units on the test set",
            "share of ReLU units",
            lambda arm: (arm["dead_units"], None, None),
            "share",
        ),
        (
            "sweep-variance",
            "Variance in evaluation over variance in training",
            "ratio, range over norms",
            _variance,
            "ratio",
        ),
    ]
    asked = any(arm.get("test_exact") for point in summary["points"] for arm in point["arms"])
    figures = [_panel(summary, *panel) for panel in panels if asked or panel[0] != "sweep-exact"]
    return [figure for figure in figures if figure is not None]


def draw_test(axes: Axes, summary: dict[str, Any], exact: bool) -> None:
    """The test metric of every arm along the knob: the curves come first among the lines, then the intervals."""
    experiment, points = summary["experiment"], summary["points"]
    values = [point["knob"] for point in points]
    rows = [
        [(_exact if exact else _test)(point["arms"][i]) for point in points] for i in range(len(experiment["arms"]))
    ]
    for draw in (_line, _bars):
        for arm, row in zip(experiment["arms"], rows, strict=True):
            draw(axes, experiment, arm["name"], _positions(values), row)
    _scales(axes, _positions(values), values, experiment, "metric")
    axes.set_xlabel(knob_words(experiment))


def _panel(summary: dict[str, Any], name: str, title: str, ylabel: str, read: Read, scale: str) -> Figure | None:
    experiment, points = summary["experiment"], summary["points"]
    knob, values = knob_words(experiment), [point["knob"] for point in points]
    positions, told = _positions(values), []
    canvas = Canvas()
    with canvas as axes:
        for index, arm in enumerate(experiment["arms"]):
            row = [read(point["arms"][index]) for point in points]
            known = [(value, triple[0]) for value, triple in zip(values, row, strict=True) if triple[0] is not None]
            if known:
                _curve(axes, experiment, arm["name"], positions, row)
                told.append(
                    f"{label(arm['name'])}: "
                    + ", ".join(f"{n.significant(y)} at {knob_value(value)}" for value, y in known)
                )
            if name in RACES:
                missed = [x for x, point in zip(positions, points, strict=True) if _missed(point["arms"][index])]
                _at_the_edge(axes, missed, line_style(experiment, arm["name"])["color"])
        _scales(axes, positions, values, experiment, scale)
        axes.set_xlabel(knob)
        axes.set_ylabel(ylabel)
    if not told:
        return None
    alternative = f"{title} along {knob}. {'; '.join(told)}."
    return Figure(canvas.svg(name, title, alternative), title, alternative)


def _curve(axes: Axes, experiment: dict[str, Any], arm: str, positions: list[float], row: list[Triple]) -> None:
    """A line through what is known, with a bar for every interval."""
    _line(axes, experiment, arm, positions, row)
    _bars(axes, experiment, arm, positions, row)


def _line(axes: Axes, experiment: dict[str, Any], arm: str, positions: list[float], row: list[Triple]) -> None:
    """Broken where a value is missing."""
    values = [float("nan") if value is None else value for value, _, _ in row]
    axes.plot(positions, values, marker=marker(experiment, arm), markersize=5, **line_style(experiment, arm))


def _bars(axes: Axes, experiment: dict[str, Any], arm: str, positions: list[float], row: list[Triple]) -> None:
    style = line_style(experiment, arm)
    for x, (value, low, high) in zip(positions, row, strict=True):
        if value is not None and low is not None:
            top = value if high is None else high
            axes.plot([x, x], [low, top], color=style["color"], linewidth=4, alpha=0.3, solid_capstyle="butt")


def _missed(arm: dict[str, Any]) -> bool:
    race = arm["steps_to_target"]
    return bool(race["of"]) and race["median"] is None


def _at_the_edge(axes: Axes, positions: list[float], colour: str) -> None:
    heights = [1.0] * len(positions)
    where = axes.get_xaxis_transform()
    axes.plot(
        positions, heights, "o", transform=where, color=colour, markerfacecolor=PAPER, markersize=6, clip_on=False
    )


def _positions(values: list[Any]) -> list[float]:
    """Numbers stand where they are; words stand side by side."""
    if all(isinstance(value, int | float) for value in values):
        return [float(value) for value in values]
    return [float(index) for index in range(len(values))]


def _scales(axes: Axes, positions: list[float], values: list[Any], experiment: dict[str, Any], scale: str) -> None:
    if min(positions) > 0 and max(positions) / min(positions) >= 8:
        axes.set_xscale("log")
    axes.set_xticks(positions, [knob_value(v) for v in values], minor=False)
    axes.minorticks_off()
    if scale in ("log", "ratio") and axes.lines:
        logarithmic(axes, "y")
    if scale == "ratio":
        axes.axhline(1, color=INK, linewidth=1)
    if scale == "share":
        percent(axes, "y", {"unit": "fraction"})
    if scale in ("share", "zero"):
        axes.set_ylim(bottom=0)
    if scale == "metric":
        percent(axes, "y", experiment["metric"])
