"""The demonstration `style` -> its page."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import Any

from normkit.report import html, markdown
from normkit.report import numbers as n
from normkit.report.document import Block, Document, Figure, Section, Table, Text
from normkit.report.labels import label
from normkit.vocabulary.record import read_json, write_atomically

Summary = dict[str, Any]
DESCRIPTION = (
    "A demonstration, not a comparison: no arms, no learning rates, no seeds. Features are fixed and nothing is "
    "trained: the opponent colours of a picture, each cut into horizontal, vertical and diagonal detail of six "
    "scales (undecimated Haar wavelets), whose sum is the picture. Style is the mean and the deviation of each of "
    "these 57 bands over space."
)
NORMS = (
    "Both photographs as one batch through one norm of their bands, whose weight and bias are the mean of their "
    "moments. How far apart their styles are behind it, as a part of how far apart they were: by the bands "
    "themselves, and by the moments of random convolutions, which took no part. 1: the norm has left the difference; "
    "0: it has removed it."
)
TRANSFERS = (
    "Style error: distance of the result's moments from those of the style, as a part of the distance that the "
    "content had; it is not 0 because neighbouring bands overlap and values are cut to what a screen shows. "
    "Correlations of the light, place by place. Half contrast: by how much the result changes, in percent of the "
    "range, when the content is given with half of its contrast."
)


def write(directory: Path) -> Path:
    """Writes report.html and report.md beside style.json and the pictures; returns the page's path."""
    page = document(read_json(directory / "style.json"), directory)
    write_atomically(directory / "report.md", markdown.render(page).encode())
    write_atomically(directory / "report.html", html.render(page).encode())
    return directory / "report.html"


def answer(summary: Summary) -> str:
    """What was seen, in words and numbers."""
    apart = {row["norm"]: row["apart"]["convolutions"] for row in summary["norms"]}
    moved = [row["style_error"]["convolutions"] for row in summary["transfers"]]
    kept = [row["content_correlation"] for row in summary["transfers"]]
    return (
        f"Behind instance norm {n.share(apart['instance'])} of the difference in style between the two photographs is "
        f"left, behind batch norm {n.share(apart['batch'])}; AdaIN leaves {_range(moved, n.share)} of the distance to "
        f"the style that it is given, and the result correlates {_range(kept, lambda v: f'{v:.2f}')} with the content."
    )


def _range(values: list[float], write: Any) -> str:
    low, high = write(min(values)), write(max(values))
    return low if low == high else f"{low} to {high}"


def tables(summary: Summary) -> tuple[Table, Table]:
    """The norms, and the transfers."""
    norms = Table(
        ["norm", "style apart, bands", "style apart, random convolutions", "content correlation", "seconds"],
        [
            [
                label(row["norm"]),
                *map(n.significant, row["apart"].values()),
                f"{row['content_correlation']:.2f}",
                _s(row),
            ]
            for row in summary["norms"]
        ],
        numeric=frozenset(range(1, 5)),
    )
    header = ["content", "style", "style error, bands", "style error, random convolutions", "correlation with content"]
    header += ["with style", "change at half contrast", "seconds"]
    rows = [
        [
            row["content"],
            row["style"],
            *map(n.significant, row["style_error"].values()),
            f"{row['content_correlation']:.2f}",
            f"{row['style_correlation']:.2f}",
            n.share(row["change_at_half_contrast"]),
            _s(row),
        ]
        for row in summary["transfers"]
    ]
    return norms, Table(header, rows, numeric=frozenset(range(2, len(header))))


def _s(row: dict[str, Any]) -> str:
    return n.seconds(row["seconds"])


def document(summary: Summary, directory: Path) -> Document:
    """The whole page; the pictures lie beside the numbers."""
    norms, transfers = tables(summary)
    originals = [_picture(directory, name, name) for name in summary["pictures"]]
    behind = [
        _picture(directory, f"{picture}-{row['norm']}", f"{picture}, behind {label(row['norm'])}")
        for row in summary["norms"][1:]
        for picture in summary["pictures"]
    ]
    moved = [
        _picture(directory, f"{row['content']}-as-{row['style']}", f"{row['content']} in the style of {row['style']}")
        for row in summary["transfers"]
    ]
    here = summary["environment"]
    sections = [
        Section("answer", "Answer", [Text(answer(summary), "answer")]),
        Section("photographs", "The photographs", list[Block](originals)),
        Section("adain", "AdaIN: the moments of the other picture", [*moved, transfers, Text(TRANSFERS, "note")]),
        Section("norms", "Instance norm and batch norm", [*behind, norms, Text(NORMS, "note")]),
        Section("environment", "Environment", [Table(["what", "value"], [[k, str(v)] for k, v in here.items()])]),
    ]
    footer = f"Made by normkit {here['normkit']}: `normkit compare style`."
    return Document("Style of two photographs", DESCRIPTION, sections, {}, footer)


def _picture(directory: Path, name: str, title: str) -> Figure:
    data = base64.b64encode((directory / f"{name}.jpg").read_bytes()).decode()
    return Figure(f'<img alt="{escape(title)}" src="data:image/jpeg;base64,{data}">', title, f"{title} ({name}.jpg)")
