"""What one sees while cells run: a live display on a terminal, plain lines elsewhere; always on standard error."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from normkit.lab.cell import FINAL, Cell

PLAIN_SECONDS = 5.0  # at most one plain line in this time
PHASES = {"search": "learning-rate search", FINAL: "final runs"}


class Display:
    """Counts runs per arm and estimates the time left; `show` and `say` decide what becomes of it."""

    def __init__(self, console: Console):
        self.console = console
        self.begin = time.monotonic()
        self.fresh, self.left = 0, 0  # runs that ended now, runs that are still to come
        self.phase = ""
        self.totals: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()  # by reason: a model that crashes crashes in every run

    def planned(self, phase: str, cells: Sequence[Cell], finished: Sequence[str], ahead: int) -> None:
        if phase != self.phase:
            self.totals, self.counts = Counter(), Counter()
        self.phase = phase
        self.totals.update(cell.arm.name for cell in cells)
        self.counts.update(cell.arm.name for cell in cells if cell.name in finished)
        self.left = len(cells) - len(finished) + ahead
        seeds, rates = len({cell.seed for cell in cells}), len({cell.lr for cell in cells})
        many = _count(seeds, "seed")
        what = many if phase == FINAL else f"{_count(rates, 'rate')}, {many}"
        done = f", {len(finished)} of them finished before" if finished else ""
        if not cells:  # no arm has a rate: all that follows is the error that says why
            return
        self.say(f"{PHASES[phase]}: {len(cells)} runs ({_count(len(self.totals), 'arm')}, {what}){done}")
        self.show()

    def done(self, cell: Cell, status: Mapping[str, Any]) -> None:
        self.counts[cell.arm.name] += 1
        self.fresh += 1
        self.left -= 1
        if status["state"] == "failed":
            self.failures[status["reason"]] += 1
            if self.failures[status["reason"]] == 1:
                self.say(f"failed: {cell.name}: {status['reason']}")
        self.show()

    @property
    def failed(self) -> str:
        return f", {self.failures.total()} failed" if self.failures else ""

    @property
    def time_left(self) -> str:
        """An estimate from the runs that ended so far: `about 40 s left`."""
        if not self.fresh:
            return "time left unknown"
        seconds = (time.monotonic() - self.begin) / self.fresh * max(0, self.left)
        if seconds < 90:
            return f"about {seconds:.0f} s left"
        return f"about {seconds / 60:.0f} min left" if seconds < 5400 else f"about {seconds / 3600:.1f} h left"

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(self) -> None:
        """Brings the display up to date."""


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


class Lines(Display):
    """Plain lines, for a file, a pipe or a log."""

    said = 0.0

    def show(self) -> None:
        done, total = self.counts.total(), self.totals.total()
        if self.fresh and (time.monotonic() - self.said > PLAIN_SECONDS or done == total):
            self.said = time.monotonic()
            self.say(f"{PHASES[self.phase]}: {done} of {total} runs{self.failed}, {self.time_left}")


class Bars(Display):
    """One bar per arm and the time left, redrawn in place."""

    def __init__(self, console: Console, progress: Progress):
        super().__init__(console)
        self.progress = progress
        self.tasks: dict[str, TaskID] = {}
        self.shown = ""

    def show(self) -> None:
        if self.phase != self.shown:
            for task in self.tasks.values():
                self.progress.remove_task(task)
            self.tasks, self.shown = {}, self.phase
        for arm, total in self.totals.items():
            if arm not in self.tasks:
                self.tasks[arm] = self.progress.add_task(arm, total=total, note="")
            note = self.time_left + self.failed if arm == next(iter(self.totals)) else ""
            self.progress.update(self.tasks[arm], total=total, completed=self.counts[arm], note=note)


@contextlib.contextmanager
def watching(quiet: bool = False) -> Iterator[Display | None]:
    """The watcher that fits standard error, None when only JSON is wanted; shown while the block runs."""
    console = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        watcher: Display | None = None
        if not quiet and console.is_terminal:
            name, note = TextColumn("  {task.description:<24}"), TextColumn("{task.fields[note]}")
            columns = (name, BarColumn(), MofNCompleteColumn(), note)
            watcher = Bars(console, stack.enter_context(Progress(*columns, console=console, transient=True)))
        elif not quiet:
            watcher = Lines(console)
        yield watcher
