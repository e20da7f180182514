"""The results in README.md: what the committed records of `normkit compare --thorough` say, in their own words."""

from __future__ import annotations

import json
from pathlib import Path

from normkit.report.words import verdict

RECORDS = Path("records") / "compare"
TASKS = ("digits", "digits-relu", "digits-cnn")
"""In the order of the README."""


def results(root: Path) -> str:
    """One paragraph per committed record: the task, the answer, the command that makes it again, the page."""
    parts = []
    for task in TASKS:
        directory = root / RECORDS / task
        if not (directory / "summary.json").exists():
            continue
        summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
        experiment = summary["experiment"]
        where = RECORDS / task
        parts.append(
            f"**{experiment['title']}** ({len(experiment['seeds'])} paired seeds, {experiment['environment']['processor']}, "
            f"torch {experiment['environment']['torch']}). {verdict(summary)}\n\n"
            f"`{experiment['command']}` · [the page]({where}/report.md) · "
            f"[the numbers]({where}/summary.json)"
        )
        if (directory / "picture.svg").exists():
            parts.append(f"![Learning curves and learning-rate sensitivity: {task}]({where}/picture.svg)")
    return "\n\n".join(parts)
