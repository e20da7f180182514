"""Drawing without global state: matplotlib figures in, inline SVG out that follows the page's colours and fonts.

Every figure is drawn in the light palette; on export each colour of the palette becomes a CSS variable, so that the
same SVG is right on a light and on a dark page. The palette is Okabe & Ito's (2008), which colour-blind readers can
tell apart; the baseline is always a neutral grey.
"""

from __future__ import annotations

import io
import math
import re
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from normkit.vocabulary.record import write_atomically

INK, MUTED, RULE, PAPER = "#1f2328", "#68707a", "#e3e5e8", "#fffffe"
ARMS = ("#767c85", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7a5195")  # 0: the baseline
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
MARKERS = "os^Dv<>P"
FORMATS = (".png", ".svg")
WIDTH, WIDE, HEIGHT = 470, 700, 300  # CSS pixels at full size

VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", PAPER: "--paper"} | {
    colour: f"--arm-{index}" for index, colour in enumerate(ARMS)
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.labelsize": 12,
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
    "axes.unicode_minus": True,
    "text.parse_math": False,  # a name may have dollars in it
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.9,
    "lines.solid_capstyle": "round",
    "path.simplify": False,
}


class Canvas:
    """One figure in the house style: ``with Canvas(width, height) as axes: ...`` then ``canvas.svg(name, ...)``."""

    def __init__(self, width: float = WIDTH, height: float = HEIGHT, columns: int = 1):
        self._style = matplotlib.rc_context(STYLE)
        self.size = (width, height)
        self.columns = columns

    def __enter__(self) -> Any:
        self._style.__enter__()
        self.figure = Figure(figsize=(self.size[0] / 72, self.size[1] / 72), layout="constrained")
        return self.figure.subplots(1, self.columns)

    def __exit__(self, *raised: Any) -> None:
        self._style.__exit__(*raised)

    def svg(self, name: str, title: str, alternative: str) -> str:
        """The figure as one <svg> element whose ids start with ``name`` and are the same every time."""
        buffer = io.StringIO()
        with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
            self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        return _inline(buffer.getvalue(), name, title, alternative)

    def file(self, path: Path) -> Path:
        """The figure as a file that stands by itself, on white; the same bytes every time.

        Raises:
            ValueError: an ending other than .png and .svg.
        """
        if path.suffix.lower() not in FORMATS:
            raise ValueError(
                f"{path}: a picture is written as {' or '.join(FORMATS)}, not as {path.suffix or 'no ending'!r}"
            )
        buffer, vector = io.BytesIO(), path.suffix.lower() == ".svg"
        metadata = {"Date": None, "Creator": None} if vector else {"Software": None}
        with matplotlib.rc_context(STYLE | {"svg.hashsalt": "picture", "svg.fonttype": "path"}):
            kind = path.suffix[1:].lower()
            self.figure.savefig(buffer, format=kind, dpi=144, facecolor="white", metadata=metadata)
        write_atomically(path, buffer.getvalue())
        return path


def _inline(svg: str, name: str, title: str, alternative: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]+)"', svg)
    assert box is not None  # matplotlib always writes one
    opening = (
        f'<svg viewBox="{box[1]}" role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(alternative)}</desc>'
    )
    body = svg[svg.index(">") + 1 :].replace("xlink:href", "href")
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)  # its "*" would reach the whole page
    body = re.sub(r'<g id="[^"]+">', "<g>", body)  # nothing refers to a group
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r'(url\(|href=")#([^")]+)', rf"\1#{name}-\2", body)
    body = re.sub(r" font-family: [^;\"]+;", "", body)  # text takes the page's font
    body = re.sub(r' transform="rotate\(-0 [^"]+"', "", body)
    body = re.sub(r'"[^"]*"', _short, body)
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    return opening + re.sub(r">\s+<", "><", body).strip()


def _short(attribute: re.Match[str]) -> str:
    """Tenths of a pixel and no line ends, which halves the file; only inside attributes: labels keep their digits."""
    text = re.sub(r"\s+", " ", attribute[0])
    return re.sub(r"(\d+\.\d)\d+", r"\1", text) if '"M ' in text else re.sub(r"(\d+\.\d\d)\d+", r"\1", text)


def colours(experiment: dict[str, Any]) -> dict[str, int]:
    """Arm -> index into ARMS: the baseline is 0 everywhere, the others count in the order of the command."""
    others = [arm["name"] for arm in experiment["arms"] if arm["name"] != experiment["baseline"]]
    rest = len(ARMS) - 1
    return {experiment["baseline"]: 0} | {name: 1 + index % rest for index, name in enumerate(others)}


def line_style(experiment: dict[str, Any], arm: str) -> dict[str, Any]:
    """Colour, dash and marker of an arm, the same in every figure; dashes differ once the colours repeat."""
    index = colours(experiment)[arm]
    position = [one["name"] for one in experiment["arms"]].index(arm)
    return {"color": ARMS[index], "linestyle": DASHES[(position // len(ARMS)) % len(DASHES)]}


def marker(experiment: dict[str, Any], arm: str) -> str:
    return MARKERS[colours(experiment)[arm] % len(MARKERS)]


def plain(value: float, _: Any = None) -> str:
    """A tick label without powers of ten where a plain number is short."""
    return (
        f"{value:g}"
        if 1e-4 < abs(value) < 1e6 or value == 0
        else f"{value:.0e}".replace("e-0", "e−").replace("e+0", "e")
    )


def logarithmic(axes: Axes, which: str) -> None:
    """A logarithmic axis with plain labels; at 2 and 5 too over less than two decades."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    decades = math.log10(high / max(low, 1e-300))
    few = MaxNLocator(5) if decades < 0.5 else LogLocator(subs=(1, 2, 5) if decades < 2 else (1,), numticks=12)
    axis.set_major_locator(few)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(plain))
    axis.set_minor_formatter(NullFormatter())


def percent(axes: Axes, which: str, about: dict[str, Any]) -> None:
    """Percent labels for a metric that is a fraction."""
    if about.get("unit") == "fraction":
        axis = axes.xaxis if which == "x" else axes.yaxis
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))


def metric_label(about: dict[str, Any], of: str) -> str:
    """ "validation accuracy", "validation loss, bits per character"."""
    unit = about.get("unit", "")
    return f"{of} {about['name']}" + (f", {unit}" if unit and unit not in ("fraction", about["name"]) else "")
