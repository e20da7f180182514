"""Processes: how far apart their running statistics are, and numbers that all of them have to agree on."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from normkit.vocabulary.reading import Reading
from normkit.watching.quantities import RANK_SPREAD


def group_of(model: nn.Module, given: Any) -> Any:
    """The processes that train this model together; ``None``: one alone, or nobody has said which."""
    if given is not None:
        return given if dist.get_world_size(given) > 1 else None
    wrapped = isinstance(model, DistributedDataParallel) and dist.get_world_size(model.process_group) > 1
    return model.process_group if wrapped else None


def overwrites(model: nn.Module) -> bool:
    """Whether DDP writes over buffers that an earlier forward pass has saved, and autograd refuses them then.

    It broadcasts buffers before each forward pass. torch 2.13 hides that from autograd, and rightly: in training batch
    norm's backward pass does not use the running statistics that were saved for it.
    """
    hidden = "_unsafe_preserve_version_counter" in DistributedDataParallel._sync_buffers.__code__.co_names
    return isinstance(model, DistributedDataParallel) and model.broadcast_buffers and not hidden


def rank() -> int:
    """0 is who writes."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def compare(model: nn.Module, group: Any, numbers: list[float], step: int) -> tuple[list[Reading], list[float]]:
    """How far apart the running means are, by layer; and the greatest of each number over the processes.

    One collective, whatever the number of layers: every process of the group calls this at the same step.
    """
    layers: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if all(isinstance(getattr(module, key, None), Tensor) for key in ("running_mean", "running_var"))
    }
    means = [module.running_mean.detach().flatten().double() for module in layers.values()]
    device = means[0].device if means else next((p.device for p in model.parameters()), torch.device("cpu"))
    own = torch.cat([*means, torch.tensor(numbers, dtype=torch.float64, device=device)])
    both = torch.cat([own, -own])
    dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
    greatest, least = both[: own.numel()], -both[own.numel() :]
    spreads, place = [], 0
    for module in layers.values():
        size, eps = module.running_mean.numel(), getattr(module, "eps", None) or 0.0
        apart = (greatest - least)[place : place + size]
        spreads.append((apart / (module.running_var.detach().flatten().double() + eps).sqrt()).max())
        place += size
    values = torch.stack(spreads).tolist() if spreads else []
    readings = [
        Reading(RANK_SPREAD.name, value, name, step, RANK_SPREAD.unit)
        for name, value in zip(layers, values, strict=True)
    ]
    return readings, greatest[place:].tolist()
