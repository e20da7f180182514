"""Several processes that know each other by gloo, in one test: an assertion that fails in one fails the test."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor


def spawn(count: int, directory: Path, function: Callable[..., None], *args: Any) -> None:
    """Run ``function(rank, *args)`` in ``count`` processes, all in one group. It stands at the top of a module."""
    torch.multiprocessing.spawn(_one, args=(count, str(directory / "store"), function, args), nprocs=count)


def _one(rank: int, count: int, store: str, function: Callable[..., None], args: tuple) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN, as in every other test
    dist.init_process_group("gloo", store=dist.FileStore(store, count), rank=rank, world_size=count)
    function(rank, *args)
    dist.barrier()  # a group that is given up right behind an all-reduce may wait for its own thread for ever
    dist.destroy_process_group()


def summed(tensor: Tensor, group: Any = None) -> Tensor:
    """The sum over all ranks."""
    total = tensor.detach().clone()
    dist.all_reduce(total, group=group)
    return total


class Counted:
    """Counts the all-reduces inside the ``with``: how many numbers of which type each has."""

    def __enter__(self) -> list[tuple[int, torch.dtype]]:
        self.original, self.sent = dist.all_reduce, []

        def reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.sent.append((tensor.numel(), tensor.dtype))
            return self.original(tensor, *args, **kwargs)

        dist.all_reduce = reduce
        return self.sent

    def __exit__(self, *_: Any) -> None:
        dist.all_reduce = self.original
