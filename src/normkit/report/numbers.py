"""How a number is written: the same text on the terminal, in the page and in its Markdown twin."""

from __future__ import annotations

import math
from typing import Any

NOTHING = "–"  # an empty cell that says it was not forgotten


def significant(value: float | None, digits: int = 3) -> str:
    """Plain decimals with so many significant digits: 1278, 72.5, 0.0413."""
    if value is None:
        return NOTHING
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}".replace("-", "−")


def count(value: float | None) -> str:
    """A number of steps, runs or units: medians may end in a half."""
    return NOTHING if value is None else f"{value:.1f}".removesuffix(".0")


def rate(value: float | None) -> str:
    """A learning rate: 0.3, 10, 0.001, 3e-05."""
    return NOTHING if value is None else f"{value:.3g}"


def factor(value: float | None) -> str:
    """A ratio without its sign of multiplication: 18, 9.8, 1.07; as many digits as it takes not to read 1.00."""
    if value is None:
        return "?"
    if value == 0:
        return "0"
    if value >= 2:
        return f"{value:.0f}" if value >= 10 else f"{value:.1f}"
    digits = 2
    while value != 1 and float(f"{value:.{digits}f}") == 1 and digits < 6:
        digits += 1
    return f"{value:.{digits}f}"


def factor_interval(low: float | None, high: float | None) -> str:
    """[7.9, 11.6]; an end that the runs do not bound is ∞."""
    return "" if low is None else f"[{factor(low)}, {'∞' if high is None else factor(high)}]"


def ratio(result: dict[str, Any] | None) -> str:
    """A paired ratio in a table: "9.8× [7.9, 11.6]", ">12× [9.5, ∞]", and its verdict where there is no number."""
    if result is None:
        return "baseline"
    if result["verdict"] in ("rarely reached", "no pairs"):
        return "no ratio"
    sign = {"exact": "", "at least": ">", "at most": "<", "unknown": ""}[result["bound"]]
    ends = factor_interval(result["low"], result["high"]) or "(one seed)"
    return f"{sign}{factor(result['value'])}× {ends}"


def seconds(value: float | None) -> str:
    return significant(value, 3) if value is None or value < 1000 else f"{value:.0f}"


def share(value: float | None) -> str:
    """A share of one, in percent."""
    return (
        NOTHING
        if value is None
        else f"{100 * value:.0f} %"
        if value >= 0.0995 or value == 0
        else f"{100 * value:.1f} %"
    )


def metric(value: float | None, about: dict[str, Any], digits: int = 1) -> str:
    """A value of the metric without its unit's name: fractions in percent, everything else with three decimals."""
    if value is None:
        return NOTHING
    if about.get("unit") == "fraction":
        return f"{100 * value:.{digits}f} %"
    return f"{value:.3f}".replace("-", "−")


def metric_interval(result: dict[str, Any], about: dict[str, Any]) -> str:
    """A mean of the metric with its interval: "97.8 % [97.5, 98.1]"."""
    text = metric(result["mean"], about)
    if result["low"] is None:
        return text
    ends = (metric(result[end], about).removesuffix(" %") for end in ("low", "high"))
    return f"{text} [{', '.join(ends)}]"


def target(value: float, about: dict[str, Any]) -> str:
    """The target in words: "95 %", "2.5 bits per character"."""
    if about.get("unit") == "fraction":
        return f"{100 * value:.6g} %"
    return f"{value:g} {about.get('unit', '')}".strip()


def difference(result: dict[str, Any], about: dict[str, Any]) -> str:
    """A paired difference with its interval: "+4.4 points [+3.7, +4.9]"."""
    if result["value"] is None:
        return NOTHING
    points = about.get("unit") == "fraction"
    scale, digits = (100, 1) if points else (1, 3)
    texts = [
        _signed(scale * value, digits)
        for value in (result["value"], result["low"], result["high"])
        if value is not None
    ]
    ends = f" [{', '.join(texts[1:])}]" if len(texts) == 3 else ""
    return f"{texts[0]}{' points' if points else ''}{ends}"


def _signed(value: float, digits: int) -> str:
    """With a sign, and with one more digit where it would read as zero."""
    digits += value != 0 and round(value, digits) == 0
    return f"{value:+.{digits}f}".replace("-", "−")


def decades(stretch: dict[str, Any] | None) -> str:
    """A range of learning rates: "0.03 to 10 (2.5 decades)"; ≥ where the grid ended before the range did."""
    if stretch is None:
        return "none"
    if stretch["rates"] == 1:
        return f"{rate(stretch['low'])} only"
    sign = "≥ " if stretch["open_low"] or stretch["open_high"] else ""
    return f"{rate(stretch['low'])} to {rate(stretch['high'])} ({sign}{stretch['decades']:.1f} decades)"
