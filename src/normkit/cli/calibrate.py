"""``normkit calibrate``: re-estimate the running statistics of a checkpoint from data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console

import normkit as nk
from normkit.cli import arguments
from normkit.cli.errors import UserError
from normkit.cli.operating import Operation, finish, opened, told


@dataclass
class Calibrate(Operation):
    """Re-estimate the running statistics of a checkpoint, whose weights stand still, from data."""

    steps: int = 200
    """How many batches at most; 0: all that there are."""


def main(argv: list[str]) -> int:
    asked = arguments.parse(Calibrate, argv, "calibrate")
    if asked.data is None:
        raise UserError("--data is missing: from which data?\n  a .npz or .pt file, or file.py:function")
    if asked.steps < 0:
        raise UserError(f"--steps {asked.steps}: give a number of batches, or 0 for all")
    loader, found = asked.batches(), opened(asked)
    assert loader is not None
    with _progress(quiet=asked.json) as progress, told():
        certificate = nk.calibrate_(
            found.model,
            loader,
            steps=asked.steps or None,
            filter_fn=asked.filter_fn,
            progress=progress,
            dry_run=asked.dry_run,
        )
    return finish(asked, argv, "calibrate", certificate, found.model, aside=found.aside)


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[int, int | None], object] | None]:
    """How many batches are done, on a terminal."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    with console.status("calibrating") as status:
        yield lambda done, of: status.update(f"batch {done}" + (f" of {of}" if of else ""))
