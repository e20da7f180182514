"""``normkit report``: a run directory read again, analysed, and its page made anew."""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table

from normkit import report
from normkit.cli import arguments
from normkit.cli.errors import from_user, require
from normkit.cli.output import show, show_json
from normkit.report import bench_page, document, generated, table
from normkit.report.words import verdict
from normkit.vocabulary.record import encode

ONE_TABLE = 118  # columns of a terminal
LARGER: dict[Any, list[str]] = {"quick": [], "default": ["--thorough"]}


@dataclass
class Report:
    """Make the page of a comparison or of a benchmark again from its directory; also while it still runs."""

    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """The directory that `normkit compare` or `normkit bench` printed, or that of a committed record."""
    picture: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Also draw one picture, comparison.png or comparison.svg: learning curves and learning-rate sensitivity, or how
    many times as fast as torch each layer is."""
    json: bool = False
    """Print the numbers as JSON instead of the table."""


def main(argv: list[str]) -> int:
    asked = arguments.parse(Report, argv, "report")
    if (asked.directory / bench_page.FILE).is_file():
        return _benchmark(asked)
    require("numpy", "scipy", "matplotlib")
    with from_user():
        summary = _summary(asked.directory)
        drawn = None if asked.picture is None else report.picture(asked.directory, asked.picture)
        page = report.write(asked.directory)
    if asked.json:
        show_json({"answer": verdict(summary), "page": str(page), **summary})
    else:
        show_result(summary, page, drawn)
    return 0


def _benchmark(asked: Report) -> int:
    records = bench_page.read(asked.directory)
    with from_user():
        page = bench_page.write(asked.directory)
        if asked.picture is not None:
            require("matplotlib")
            bench_page.picture(asked.directory, asked.picture)
    if asked.json:
        show_json(encode({"answer": bench_page.answer(records), "page": page, "records": records}))
    else:
        files = [f"page: {page}", *([f"picture: {asked.picture}"] if asked.picture else [])]
        show(bench_page.answer(records), "\n".join(files), then="normkit bench --list")
    return 0


def _summary(directory: Path) -> dict[str, Any]:
    """The analysis of the runs; where only a summary.json was kept, as in a committed record, that one."""
    from normkit.lab.analyse import analyse

    if (directory / "summary.json").is_file() and not (directory / "experiment.json").exists():
        return encode(report.read_summary(directory))
    return analyse(directory)


def show_result(summary: dict[str, Any], page: Path, picture: Path | None = None) -> None:
    """The answer in words, the table, where the page is, and the next command to type."""
    files = [f"page: {page}", *([f"picture: {picture}"] if picture else [])]
    show(verdict(summary), *terminal_tables(summary), "\n".join(files), then=following(summary, page.parent))


def terminal_tables(summary: dict[str, Any]) -> list[Table]:
    """The main table for rich, as two where one would not fit into the terminal, and what the experiment measured."""
    columns = table.main_columns(summary)
    narrow = sys.stdout.isatty() and shutil.get_terminal_size().columns < ONE_TABLE
    half = (len(columns) + 1) // 2
    parts = (columns[:half], columns[half:]) if narrow else (columns,)
    if own := generated.columns(summary):
        parts = (*parts, own)
    return [terminal_table(table.table(summary, part)) for part in parts]


def terminal_table(content: document.Table) -> Table:
    """A table of the page for rich."""
    drawn = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for index, title in enumerate(content.header):
        drawn.add_column(title, justify="right" if index in content.numeric else "left")
    for row in content.rows:
        drawn.add_row(*(cell.replace(" [", "\n[").replace(" (", "\n(") for cell in row))  # an interval under its number
    return drawn


def following(summary: dict[str, Any], directory: Path) -> str:
    """What one would type next: the rest of the runs, then a larger budget, then the picture."""
    experiment = summary["experiment"]
    command = str(experiment.get("command") or "")
    budget = experiment.get("budget")
    unfinished = any(arm["runs"]["unfinished"] for point in summary["points"] for arm in point["arms"])
    if command.startswith("normkit compare ") and (unfinished or budget in LARGER):
        return command if unfinished else shlex.join([*_elsewhere(command), *LARGER[budget]])
    return shlex.join(["normkit", "report", str(directory), "--picture", str(directory / "picture.png")])


def _elsewhere(command: str) -> list[str]:
    """The command without budget and directory: with another budget it is another experiment, in another place."""
    words = shlex.split(command)
    return [
        word
        for before, word in zip(["", *words], words, strict=False)
        if word not in ("--quick", "--thorough", "--out") and before != "--out" and not word.startswith("--out=")
    ]
