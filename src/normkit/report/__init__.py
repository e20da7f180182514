"""Summary -> page: words, tables and pictures from the numbers of ``summary.json``; never imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from normkit.vocabulary.record import read_json, write_atomically


def write(directory: str | Path) -> Path:
    """Write report.html and report.md beside the summary.json of a run directory; returns the page's path.

    Raises ValueError when there is no summary: ``normkit report DIR`` computes it first.
    """
    from normkit.report import html, markdown
    from normkit.report.page import document

    path = Path(directory)
    page = document(read_summary(path))
    write_atomically(path / "report.md", markdown.render(page).encode())
    write_atomically(path / "report.html", html.render(page).encode())
    return path / "report.html"


def picture(directory: str | Path, path: str | Path) -> Path:
    """Draw learning curves and learning-rate sensitivity of all arms into one PNG or SVG file (the ending says)."""
    from normkit.report.plots.picture import draw

    return draw(read_summary(Path(directory)), Path(path))


def read_summary(directory: Path) -> dict[str, Any]:
    """The summary.json of a run directory; raises ValueError when there is none."""
    file = directory / "summary.json"
    if not file.is_file():
        raise ValueError(f"{directory}: no summary.json; `normkit report {directory}` computes it and makes the page")
    return read_json(file)
