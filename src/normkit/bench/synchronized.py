"""What synchronised statistics cost: a step of the layer in 1 to 3 processes on this machine, and the bytes it sends.

The processes run plain and synchronised batch norm in turns, side by side, all in the same order: whoever took a sample
again by itself would wait for the others for ever. One process is the yardstick: nothing is sent. Processes share the
machine's cores, so times of different numbers of processes say little about each other; the difference within a row is
the communication, and the waiting for the slowest.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

import normkit as nk
from normkit.bench.cases import Case
from normkit.bench.cell import Effort, Record, numbers
from normkit.bench.clock import Round, Step, take
from normkit.bench.peers import BASELINE

PROCESSES = (1, 2, 3)
PLAIN, SYNCHRONISED = "normkit, not synchronised", "normkit"
REPEATS = 5
"""Timed calls per sample; the same in every process."""
CASES: tuple[Case, ...] = (
    Case("batch", (4, 64, 28, 28), "few channels, small batches: where people synchronise"),
    Case("batch", (4, 512, 7, 7), "many channels, little data: communication against computation at its worst"),
    Case("batch", (4, 256, 56, 56), "a large tensor: communication should vanish"),
)
"""Shapes of the batch of one process."""


def measure(case: Case, dtype: str, processes: int, effort: Effort) -> list[Record]:
    """One record for plain and one for synchronised batch norm, from the first process."""
    about = {
        "kind": "synchronized",
        "op": f"{case.op}, {processes} {'process' if processes == 1 else 'processes'}",
        "shape": list(case.shape),
        "dtype": dtype,
        "layout": "contiguous",
        "reason": case.reason,
        "device": "cpu",
        "processes": processes,
        "state": "measured",
    }
    with tempfile.TemporaryDirectory() as directory:
        answer = Path(directory) / "records.pt"
        given = (processes, f"{directory}/store", str(answer), case.shape, dtype, effort.rounds)
        torch.multiprocessing.spawn(_process, args=given, nprocs=processes)
        found = torch.load(answer, weights_only=True)
    parity = found.pop("parity")
    if parity["error"] > parity["limit"]:
        why = f"parity is red, so it is not timed: error {parity['error']:.1e}, limit {parity['limit']:.1e}"
        return [{**about, "implementation": SYNCHRONISED, "state": "refused", "why": why}]
    names = {BASELINE: PLAIN, SYNCHRONISED: SYNCHRONISED}
    return [{**about, "implementation": names[key], "parity": {"output": parity}, **r} for key, r in found.items()]


def _process(
    rank: int, processes: int, store: str, answer: str, shape: tuple[int, ...], dtype: str, rounds: int
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all of them are on this machine
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, processes), rank=rank, world_size=processes)
    torch.manual_seed(rank)
    x = torch.randn(shape, dtype=getattr(torch, dtype)).mul_(3).add_(2).requires_grad_()
    upstream = torch.randn_like(x)
    layers = _layers(shape[1], x.dtype)
    parity = _parity(layers[SYNCHRONISED], x.detach(), processes, rank)
    steps = {name: _step(layer, x, upstream) for name, layer in layers.items()}
    sent = {name: _bytes_sent(step) for name, step in steps.items()}
    taken: list[Round] = [{name: take(step, REPEATS) for name, step in steps.items()} for _ in range(rounds)]
    if rank == 0:
        records = {name: {**numbers(name, taken), "bytes": sent[name]} for name in steps}
        torch.save({"parity": parity, **records}, answer)
    dist.barrier()  # a group that is given up right behind an all-reduce may wait for its own thread for ever
    dist.destroy_process_group()


def _layers(channels: int, dtype: torch.dtype) -> dict[str, Any]:
    """The baseline of every difference is the same layer, which knows nothing of other processes."""
    policy = nk.statistics.Synchronized()
    return {
        BASELINE: nk.BatchNorm2d(channels, dtype=dtype),
        SYNCHRONISED: nk.BatchNorm2d(channels, dtype=dtype, statistics=policy),
    }


def _parity(layer: Any, x: Tensor, processes: int, rank: int) -> dict[str, float]:
    """The distance of the output from that of the whole batch in float64, in norms; the same in every process."""
    everything = [torch.empty_like(x) for _ in range(processes)]
    dist.all_gather(everything, x)
    wanted = torch.nn.functional.batch_norm(torch.cat(everything).double(), None, None, training=True)
    wanted = wanted.chunk(processes)[rank]
    error = (layer(x).double() - wanted).norm() / wanted.norm()
    dist.all_reduce(error, dist.ReduceOp.MAX)
    return {"error": error.item(), "limit": 16 * torch.finfo(x.dtype).eps}


def _step(layer: torch.nn.Module, x: Tensor, upstream: Tensor) -> Step:
    inputs = (x, *layer.parameters())
    return Step(lambda: layer(x), lambda y: torch.autograd.grad(y, inputs, upstream))


def _bytes_sent(step: Step) -> dict[str, int]:
    """What one call hands to the all-reduce, forward and backward. How often that crosses a wire is the backend's."""
    handed: list[int] = []
    reduce = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        handed.append(tensor.numel() * tensor.element_size())
        return reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        y = step.forward()
        forward = sum(handed)
        step.finish(y)
    finally:
        dist.all_reduce = reduce
    return {"forward": forward, "backward": sum(handed) - forward}
