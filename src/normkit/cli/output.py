"""What every verb prints in the same way: the answer first, then the tables, then the next command to type."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console, RenderableType

PIPED_WIDTH = 160
"""Columns where the output is no terminal: rich would assume 80 and break rows that a file or a pipe has room for."""


class Output(Console):
    """Leaves a reader who stops early (``normkit list | head -1``) to ``main``, where rich would exit with 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def show(answer: str, *parts: RenderableType, then: str) -> None:
    """Print the answer in words, the parts, and the next command to type."""
    console = Output(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False, markup=False, emoji=False)
    console.print(answer, style="bold", soft_wrap=True)
    for part in parts:
        console.print()
        console.print(part)
    console.print()
    console.print(f"next: {then}", soft_wrap=True)


def show_json(data: dict[str, Any]) -> None:
    """Print ``data`` as strict JSON, and nothing else."""
    print(json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False))
