"""One cell trained by several processes of this machine, which know each other by gloo."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing as processes

from normkit.lab import closing
from normkit.lab.cell import Cell
from normkit.lab.load import Source
from normkit.lab.ranks import Ranks
from normkit.vocabulary.record import read_json, write_json

PRELOADED = ["torch", "sklearn.datasets", "normkit.lab.worker"]
"""What the server of processes imports once, so that a process of a short run does not spend its life importing."""


def train_together(source: Source, cell: Cell, directory: Path) -> dict[str, Any]:
    """Trains a cell with `cell.arm.processes` processes; returns the measured part of status.json, the first one's.

    There are no checkpoints: a run that was killed begins again. An exception in any process ends all of them, and is
    raised here.
    """
    from joblib.externals.loky.backend.reduction import dumps  # of a person's own function too

    multiprocessing.set_forkserver_preload(PRELOADED)
    count = cell.arm.processes
    with tempfile.TemporaryDirectory() as scratch:
        given = (count, scratch, bytes(dumps((source, cell))), str(directory))
        processes.start_processes(_rank, args=given, nprocs=count, start_method="forkserver")
        return read_json(Path(scratch) / "measured.json")


def _rank(rank: int, count: int, scratch: str, pickled: bytes, directory: str) -> None:
    from normkit.lab.train import train
    from normkit.lab.worker import data_of

    source, cell = pickle.loads(pickled)
    torch.set_num_threads(cell.threads)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all of them are on this machine
    dist.init_process_group("gloo", store=dist.FileStore(f"{scratch}/store", count), rank=rank, world_size=count)
    ranks = Ranks(rank, count)
    place = Path(directory if rank == 0 else tempfile.mkdtemp(dir=scratch))  # one journal is enough
    closing.forget_greatest_memory()
    measured = train(cell, source.load(cell.options), data_of(source, cell), place, float("inf"), ranks)
    measured["peak_memory_mb"] = ranks.total(closing.greatest_memory_mb() or 0.0) or None
    if rank == 0:
        write_json(Path(scratch) / "measured.json", measured)
    dist.barrier()  # a group that is given up right behind an all-reduce may wait for its own thread for ever
    dist.destroy_process_group()
