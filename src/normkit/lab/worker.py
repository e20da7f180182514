"""What a worker does with one cell: lock it, train it, write how it ended. Any exception ends up in status.json."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from normkit.lab import checkpoint, closing
from normkit.lab.cell import Cell
from normkit.lab.data import Data, as_data
from normkit.lab.experiment import Experiment
from normkit.lab.load import Source
from normkit.lab.together import train_together
from normkit.lab.train import train
from normkit.vocabulary.record import read_json, write_json

SETTLED = ("done", "diverged")  # a failed run has no result: the same command tries it again

try:
    import fcntl
except ImportError:  # not on Linux: two commands in one directory are not kept apart
    fcntl = None  # type: ignore[assignment]


def run_cell(
    source: Source, cell: Cell, directory: Path, checkpoint_seconds: float, coordinator: int
) -> dict[str, Any]:
    """Trains a cell unless it has a result already, and returns its status.

    coordinator: process id of the command; a worker process whose command was killed ends itself within a second.
    """
    place = directory / "cells" / cell.name
    if os.getppid() == coordinator:
        _become_a_worker(coordinator)
    with _lock(place / "config.json"), _threads(cell.threads):
        status = read_json(place / "status.json")
        if status["state"] in SETTLED:  # another command in the same directory was faster
            return status
        begun = {"state": "running", "reason": None, "attempts": status.get("attempts", 0) + 1}
        write_json(place / "status.json", begun)
        closing.forget_greatest_memory()
        try:
            if cell.arm.processes > 1:
                measured = train_together(source, cell, place)
            else:
                measured = train(cell, source.load(cell.options), data_of(source, cell), place, checkpoint_seconds)
        except Exception as error:
            measured = failure(f"{type(error).__name__}: {error}", traceback.format_exc())
        ended = begun | {"peak_memory_mb": closing.greatest_memory_mb()} | measured
        write_json(place / "status.json", ended)
        checkpoint.remove(place)
        return ended


def failure(reason: str, trace: str = "") -> dict[str, Any]:
    """What status.json says about a run that could not be finished."""
    return {"state": "failed", "reason": reason.splitlines()[0] if reason else "unknown", "traceback": trace}


def data_of(source: Source, cell: Cell) -> Data:
    """The data of a cell's seed; the arms of one seed follow each other, so the last few are kept."""
    return _data(source, tuple(sorted(cell.options.items())), cell.seed)


@lru_cache(maxsize=4)
def _data(source: Source, options: tuple[tuple[str, Any], ...], seed: int) -> Data:
    return seeded_data(source.load(dict(options)), seed)


def seeded_data(experiment: Experiment, seed: int) -> Data:
    """The three splits of an experiment for one seed."""
    data = experiment.data(seed) if callable(experiment.data) else experiment.data
    return as_data(data, f"data of {experiment.name}")


@lru_cache(maxsize=1)
def _become_a_worker(coordinator: int) -> None:
    """Once per worker process: Ctrl-C is for the command alone to handle, and no worker outlives a killed command.

    An orphan that trained on would write the files of a cell that the same command, typed again, has just restarted.
    """
    if (
        threading.current_thread() is threading.main_thread()
    ):  # dask runs cells in other threads, and minds Ctrl-C itself
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_when_orphaned, args=(coordinator,), daemon=True).start()


def _end_when_orphaned(coordinator: int) -> None:
    while os.getppid() == coordinator:
        time.sleep(0.5)
    os._exit(1)  # the checkpoint stays


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Two commands in one directory share the work instead of writing the same files; a kill releases the lock."""
    with open(path, "rb") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
