"""A check that all processes call the synchronised layers of a model equally: an error in the place of a hang."""

from __future__ import annotations

import collections
import contextlib
import datetime
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import nn

from normkit.statistics.synchronized import Synchronized, initialised, ranks_of

_END = "the end of the block"
_blocks: collections.Counter[tuple[int, ...]] = collections.Counter()
"""How many blocks each group of ranks has opened: the entries of one are not those of the next."""


@contextlib.contextmanager
def same_calls(model: nn.Module, *, seconds: float = 60.0) -> Iterator[None]:
    """Inside, a process that calls a synchronised layer which another one does not call gets an error with its name.

    Without it, both wait for each other: for ever, or until the backend gives up without a word about the layer. Every
    process opens the block around the same steps. Costs a few messages per call through the store by which the
    processes found each other, so switch it on to search, not for a whole training run.

    Args:
        model: whose layers are watched.
        seconds: how long a process waits for the others at one call.

    Raises:
        RuntimeError: the calls differ, or a process did not come in time; the message says who was where.

    >>> import torch, normkit as nk
    >>> model = nk.SyncBatchNorm(2)
    >>> with nk.statistics.same_calls(model):          # one process: nothing to compare
    ...     y = model(torch.randn(4, 2))
    """
    diaries: dict[tuple[int, ...], _Diary] = {}
    handles = []
    for name, layer in model.named_modules():
        policy = getattr(layer, "statistics", None)
        if not isinstance(policy, Synchronized) or not initialised() or policy.alone():
            continue
        ranks = ranks_of(policy.process_group)
        if ranks and ranks not in diaries:
            diaries[ranks] = _Diary(ranks, seconds)
        if ranks:
            handles.append(layer.register_forward_pre_hook(_Hook(name, diaries[ranks])))
    try:
        yield
    except BaseException as error:
        for diary in diaries.values():
            diary.write(f"{_END}, by {type(error).__name__}")
        raise
    else:
        for diary in diaries.values():
            diary.compare(_END)
    finally:
        for handle in handles:
            handle.remove()


class _Hook:
    def __init__(self, name: str, diary: _Diary) -> None:
        self.name, self.diary = name, diary

    def __call__(self, layer: Any, args: tuple) -> None:
        if layer.training and not layer.frozen:
            self.diary.compare(f"{self.name or 'the model'} ({type(layer).__name__} of {layer.num_features} channels)")


class _Diary:
    """What each rank of one group calls, in the store that all can read."""

    def __init__(self, ranks: tuple[int, ...], seconds: float) -> None:
        _blocks[ranks] += 1
        prefix = f"normkit/same_calls/{'-'.join(map(str, ranks))}/{_blocks[ranks]}"
        self.store = dist.PrefixStore(prefix, dist.distributed_c10d._get_default_store())
        self.ranks, self.seconds, self.calls = ranks, seconds, 0

    def write(self, what: str) -> None:
        """Say what this rank does next; wait for nobody."""
        self.calls += 1
        self.store.set(f"{self.calls}/{dist.get_rank()}", what)

    def compare(self, what: str) -> None:
        """Say it, and wait until the others have said the same."""
        self.write(what)
        said = {rank: self._read(rank, what) for rank in self.ranks}
        if len(set(said.values())) > 1:
            where = "".join(f"\n  rank {rank}: {words}" for rank, words in said.items())
            raise RuntimeError(
                f"same_calls: the processes do not call the synchronised layers equally.\n  call {self.calls} of this "
                f"block{where}\n  in training, every process has to run the same layers equally often, with an empty "
                "batch where it has no samples"
            )

    def _read(self, rank: int, what: str) -> str:
        key = f"{self.calls}/{rank}"
        try:
            self.store.wait([key], datetime.timedelta(seconds=self.seconds))
        except RuntimeError as error:
            raise RuntimeError(
                f"same_calls: rank {dist.get_rank()} is at {what}, call {self.calls} of this block, and rank {rank} "
                f"did not come to any synchronised layer within {self.seconds:g} s.\n"
                "  it has skipped the layer, or stopped; where it is only slow, give more seconds="
            ) from error
        return self.store.get(key).decode()
