"""From metric lines to drawable series: medians over seeds with the range of all seeds, at most 500 points."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from normkit.lab.analyse.directory import as_number
from normkit.vocabulary.record import Record

POINTS = 500


def learning_curve(cells: Sequence[Record], points: int = POINTS) -> dict[str, list]:
    """The metric on validation data over training: per step the median, lowest and highest seed and median seconds.

    A seed that diverged is in the curve up to its last finite value; ``runs`` says how many seeds each point holds.
    """
    at: dict[int, list[tuple[float, float]]] = {}
    for cell in cells:
        for line in cell.metrics:
            value, seconds = as_number(line.get("validation")), as_number(line.get("seconds"))
            if value is not None and seconds is not None:
                at.setdefault(int(line["step"]), []).append((value, seconds))
    steps = thin(sorted(at), points)
    values = [sorted(value for value, _ in at[step]) for step in steps]
    return {
        "step": steps,
        "seconds": [_short(median(seconds for _, seconds in at[step])) for step in steps],
        "median": [_short(median(v)) for v in values],
        "low": [_short(v[0]) for v in values],
        "high": [_short(v[-1]) for v in values],
        "runs": [len(v) for v in values],
    }


def thin(steps: Sequence[int], points: int) -> list[int]:
    """At most ``points`` of the steps: every one early on, ever sparser later, as on a logarithmic axis; ends stay."""
    if len(steps) <= points:
        return list(steps)
    last = len(steps) - 1
    even = {round(i * last / (points // 2 - 1)) for i in range(points // 2)}
    early = {round((last + 1) ** (i / (points // 2 - 1))) - 1 for i in range(points // 2)}
    return [steps[i] for i in sorted(even | early)]


def unit_percentiles(cells: Sequence[Record], points: int) -> dict[str, Any] | None:
    """Percentiles 15, 50 and 85 of the late unit over training, from the first seed that has them; None without any."""
    for cell in cells:
        lines = {int(line["step"]): line["unit"] for line in cell.inside if line.get("unit")}
        steps = [step for step in sorted(lines) if all(as_number(p) is not None for p in lines[step]["percentiles"])]
        if steps:
            steps = thin(steps, points)
            low, middle, high = zip(*(map(_short, lines[step]["percentiles"]) for step in steps), strict=True)
            return {
                "seed": cell.config["seed"],
                "layer": str(lines[steps[0]].get("layer", "")),
                "step": steps,
                "p15": list(low),
                "p50": list(middle),
                "p85": list(high),
            }
    return None


def gradient_norms(cells: Sequence[Record]) -> dict[str, Any] | None:
    """Gradient norm of every weight matrix at the first and the last sample, median over seeds; None without any."""
    first, last = [], []
    for cell in cells:
        samples = [line for line in cell.inside if line.get("gradient_norms")]
        if samples:
            first.append(samples[0])
            last.append(samples[-1])
    if not first:
        return None
    return {
        "layers": list(first[0]["gradient_norms"]),
        "start": {"step": first[0]["step"], "norms": _per_layer(first)},
        "end": {"step": max(line["step"] for line in last), "norms": _per_layer(last)},
    }


def state_gradients(cells: Sequence[Record]) -> list[dict[str, Any]] | None:
    """Gradient norm at every time step of a recurrent network, median over seeds, at each training step that has it."""
    found: dict[int, list[list[float | None]]] = {}
    for cell in cells:
        for line in cell.status.get("state_gradients") or ():
            found.setdefault(int(line["step"]), []).append([as_number(norm) for norm in line["norms"]])
    if not found:
        return None
    return [
        {"step": step, "norms": [middle(at_one) for at_one in zip(*rows, strict=True)]}
        for step, rows in sorted(found.items())
    ]


def _per_layer(lines: Sequence[dict[str, Any]]) -> list[float | None]:
    layers = lines[0]["gradient_norms"]
    return [middle(as_number(line["gradient_norms"].get(layer)) for line in lines) for layer in layers]


def middle(values: Iterable[float | None]) -> float | None:
    """The median of what is there; None when nothing is."""
    known = [value for value in values if value is not None]
    return _short(median(known)) if known else None


def _short(value: float) -> float:
    """Six significant digits: more than a picture can show, and a third of the file."""
    return float(f"{value:.6g}")
