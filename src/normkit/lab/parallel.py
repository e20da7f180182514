"""Cells in parallel: which joblib backend, how many workers, how many threads each."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from normkit.lab.errors import LabError, missing_extra, nearest

BACKENDS = ("loky", "dask", "ray")


@dataclass(frozen=True)
class Parallel:
    """backend: loky (processes of this machine), dask, ray, or sequential; workers: how many cells at a time."""

    backend: str
    workers: int

    @property
    def threads(self) -> int:
        """Threads per cell, so that cells do not fight for cores; never more than OMP_NUM_THREADS or torch was told."""
        return max(1, min(cores() // self.workers, torch.get_num_threads()))


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_parallel(text: str) -> Parallel:
    """Reads `loky` (all cores), `loky:4` or `4` (4 workers), `1` (one after the other), `dask` or `ray`."""
    name, _, count = text.strip().lower().partition(":")
    if name.isdigit():
        name, count = "loky", name
    if name not in BACKENDS:
        raise LabError(
            f"--parallel {text!r} is unknown{nearest(name, BACKENDS)}; choose loky (all cores), loky:N or N (N "
            "workers), 1 (one after the other), dask or ray"
        )
    if count and not (count.isdigit() and int(count) > 0):
        raise LabError(f"--parallel {text!r}: {count!r} is no number of workers; write e.g. {name}:4")
    workers = int(count) if count else cores()
    return Parallel("sequential" if name == "loky" and workers == 1 else name, workers)


@contextlib.contextmanager
def pool(parallel: Parallel) -> Iterator[Any]:
    """A function that runs joblib's delayed calls and yields their results as they come; LabError without the extra."""
    try:
        import joblib
    except ImportError:
        raise missing_extra("joblib", "lab", "normkit compare") from None
    with contextlib.ExitStack() as stack:
        if parallel.backend == "dask":
            stack.enter_context(_dask_client(parallel.workers))
        if parallel.backend == "ray":
            _start_ray()
        stack.enter_context(joblib.parallel_config(backend=parallel.backend, n_jobs=parallel.workers))
        try:
            yield _run
        except KeyboardInterrupt:
            _stop_workers()
            raise


def _run(calls: Any) -> Iterator[Any]:
    """Results in the order in which they come, where the backend can; otherwise all at the end."""
    import joblib

    runner = joblib.Parallel(batch_size=1, pre_dispatch="2*n_jobs", return_as="list")
    if getattr(runner._backend, "supports_return_generator", False):
        runner = joblib.Parallel(batch_size=1, pre_dispatch="2*n_jobs", return_as="generator_unordered")
    yield from runner(calls)


def _stop_workers() -> None:
    """Ends the worker processes of this machine at once: their checkpoints are what the next command goes on from."""
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor().shutdown(wait=False, kill_workers=True)


def _dask_client(workers: int) -> Any:
    try:
        from distributed import Client, get_client
    except ImportError:
        raise missing_extra("dask", "dask", "--parallel dask") from None
    try:
        return contextlib.nullcontext(get_client())  # the one the caller has connected
    except ValueError:
        if "DASK_SCHEDULER_ADDRESS" in os.environ:
            return Client()
        return Client(n_workers=workers, threads_per_worker=1, processes=True)


def _start_ray() -> None:
    try:
        from ray.util.joblib import register_ray
    except ImportError:
        raise missing_extra("ray", "ray", "--parallel ray") from None
    register_ray()
