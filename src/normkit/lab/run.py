"""Runs a recipe: the search for each arm's learning rate, then the final runs; whatever is done already is skipped."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from normkit.lab.cell import FINAL, SEARCH, Cell
from normkit.lab.directory import note_environment, prepare_cell, read_chosen, write_chosen, write_status
from normkit.lab.experiment import Metric
from normkit.lab.load import Source
from normkit.lab.parallel import Parallel, pool
from normkit.lab.recipe import Recipe, chosen_key
from normkit.lab.search import best_rate, choose, extend
from normkit.lab.worker import SETTLED, failure, run_cell


class Watcher(Protocol):
    """Who looks on while cells run: a progress display, or nobody."""

    def planned(self, phase: str, cells: Sequence[Cell], finished: Sequence[str], ahead: int) -> None:
        """A round of cells begins; finished: names of those that are; ahead: runs planned after this round."""

    def done(self, cell: Cell, status: Mapping[str, Any]) -> None:
        """A cell has ended."""


class Nobody:
    """The watcher that looks at nothing."""

    def planned(self, phase: str, cells: Sequence[Cell], finished: Sequence[str], ahead: int) -> None: ...
    def done(self, cell: Cell, status: Mapping[str, Any]) -> None: ...


@dataclass
class Engine:
    """One recipe being run in one directory."""

    recipe: Recipe
    source: Source
    metric: Metric
    directory: Path
    parallel: Parallel
    environment: Mapping[str, Any]  # of this command; its threads are those of a cell
    watcher: Watcher = field(default_factory=Nobody)
    checkpoint_seconds: float = 2.0

    @property
    def threads(self) -> int:
        return self.environment["threads"]

    def go(self) -> None:
        """Searches, chooses, runs the final cells. Interrupt or kill it at any moment: `go` again goes on."""
        with pool(self.parallel) as call:
            self._search(call)
            chosen = read_chosen(self.directory)
            finals = [cell for value in self.recipe.values for cell in self._finals(chosen, value)]
            self._run(call, FINAL, finals)

    def _search(self, call: Callable[..., Iterable[Any]]) -> None:
        """Searches every value of the knob at which an arm has no rate yet, all values in the same rounds.

        An arm whose runs all crashed is tried again; a rate that was chosen stays, for final runs have it already.
        """
        begun = read_chosen(self.directory)
        grids = {
            value: list(self.recipe.rates)
            for value in self.recipe.values
            if not all(chosen_key(arm.name, value) in begun for arm in self.recipe.arms)
        }
        fresh = {value: tuple(rates) for value, rates in grids.items()}
        results: dict[Any, dict[str, dict[float, list[Any]]]] = {value: {} for value in grids}
        while fresh:
            cells = {v: self.recipe.search_cells(rates, v, self.threads) for v, rates in fresh.items()}
            statuses = self._run(call, SEARCH, [cell for group in cells.values() for cell in group])
            for value, group in cells.items():
                for cell in group:
                    by_rate = results[value].setdefault(cell.arm.name, {})
                    by_rate.setdefault(cell.lr, []).append(statuses[cell.name])
            added = {value: extend(grids[value], self._best(results[value]), self.recipe.rates) for value in fresh}
            for value in set(fresh) - {value for value, rates in added.items() if rates}:
                self._choose(value, grids[value], self._best(results[value]))
            fresh = {value: rates for value, rates in added.items() if rates}
            for value, rates in fresh.items():
                grids[value] += rates

    def _best(self, results: Mapping[str, Mapping[float, Sequence[Any]]]) -> dict[str, float | None]:
        return {arm: best_rate(by_rate, self.metric) for arm, by_rate in results.items()}

    def _choose(self, value: Any, rates: Sequence[float], best: Mapping[str, float | None]) -> None:
        begun = read_chosen(self.directory)
        found = {chosen_key(arm, value): choice for arm, choice in choose(rates, best).items()}
        chosen = {key: choice for key, choice in found.items() if key not in begun}
        searched = {"" if value is None else str(value): sorted(rates)}
        write_chosen(self.directory, chosen, searched)

    def _finals(self, chosen: Mapping[str, Any], value: Any) -> list[Cell]:
        keys = {arm.name: chosen_key(arm.name, value) for arm in self.recipe.arms}
        rates = {arm: chosen[key]["lr"] for arm, key in keys.items() if key in chosen}
        return self.recipe.final_cells(rates, value, self.threads)

    def _run(self, call: Callable[..., Iterable[Any]], phase: str, cells: Sequence[Cell]) -> dict[str, Any]:
        """Runs the cells that have no result yet; returns the status of all, by name."""
        statuses = {cell.name: prepare_cell(self.directory, cell) for cell in cells}
        todo = [cell for cell in cells if statuses[cell.name]["state"] not in SETTLED]
        finished = [name for name, status in statuses.items() if status["state"] in SETTLED]
        ahead = len(self.recipe.values) * len(self.recipe.arms) * len(self.recipe.seeds) if phase == SEARCH else 0
        self.watcher.planned(phase, cells, finished, ahead)
        if todo:
            note_environment(self.directory, self.environment)
        while todo:
            try:
                self._round(call, todo, statuses)
            except BrokenProcessPool:
                self._after_a_crash(call, todo, statuses)
            todo = [cell for cell in todo if statuses[cell.name]["state"] in ("pending", "running")]
        return statuses

    def _round(self, call: Callable[..., Iterable[Any]], cells: Sequence[Cell], statuses: dict[str, Any]) -> None:
        from joblib import delayed

        by_name = {cell.name: cell for cell in cells}
        arguments = (self.directory, self.checkpoint_seconds, os.getpid())
        for name, status in call(delayed(_named)(self.source, cell, *arguments) for cell in cells):
            statuses[name] = status
            self.watcher.done(by_name[name], status)

    def _after_a_crash(
        self, call: Callable[..., Iterable[Any]], cells: Sequence[Cell], statuses: dict[str, Any]
    ) -> None:
        """A worker process died: what was running goes again, one by one; what kills its process twice has failed."""
        for cell in cells:
            statuses[cell.name] = prepare_cell(self.directory, cell)
        for suspect in [cell for cell in cells if statuses[cell.name]["state"] == "running"]:
            try:
                self._round(call, [suspect], statuses)
            except BrokenProcessPool as error:
                died = failure(
                    "its worker process died twice: out of memory, or a crash in native code (the last words of the "
                    "process are on the terminal)",
                    str(error),
                )
                statuses[suspect.name] = prepare_cell(self.directory, suspect) | died
                write_status(self.directory, suspect, statuses[suspect.name])
                self.watcher.done(suspect, statuses[suspect.name])


def _named(source: Source, cell: Cell, directory: Path, checkpoint_seconds: float, coordinator: int) -> tuple[str, Any]:
    return cell.name, run_cell(source, cell, directory, checkpoint_seconds, coordinator)
