"""``nk.merge_statistics_``: the running statistics of all processes, pooled."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normkit.moments import Moments
from normkit.statistics.buffers import Kept
from normkit.statistics.policy import PREFIX
from normkit.statistics.synchronized import initialised
from normkit.statistics.table import Table
from normkit.surgery.operate import Plan, operate
from normkit.vocabulary.certificate import Certificate
from normkit.vocabulary.prescription import Prescription

Filter = Callable[[nn.Module, str], bool]
_NORMS = nn.modules.batchnorm._NormBase
_INSTANCE = nn.modules.instancenorm._InstanceNorm


def merge_statistics_(
    model: nn.Module, process_group: Any = None, *, filter_fn: Filter | None = None, dry_run: bool = False
) -> Certificate:
    """Pool the running statistics of all processes, so that each has those of what all have seen. In place.

    For layers that are not synchronised: under DistributedDataParallel the statistics of rank 0 win, and what the
    others saw is lost. One call before saving or evaluating, by every process. Exact: the mean is the weighted mean of
    the means, the variance the weighted mean of the variances plus the variance between the means (which an average of
    variances leaves out). Instance norms keep the variance within samples, of which it is the weighted mean. A process
    weighs as many values as its statistics are made of, where that is known: with ``momentum=None``. With a number for
    ``momentum`` all weigh the same. One that has seen no batch counts nothing.

    Args:
        model: of torch's or normkit's layers, the same on every process; wrapped, sharded or compiled as it may be.
        process_group: of ``torch.distributed``; ``None``: all processes.
        filter_fn: ``(module, name) -> bool``: which layers; default all that keep running statistics. The same on every
            process.
        dry_run: change nothing, and return what would be done.

    Returns:
        Which layers were merged; ``certificate.undo()`` puts the statistics of this process back. Counters of batches
        stay what they were, so that merging twice is merging once.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialised, or the processes have different layers.

    Communicates 24 bytes per channel and 8 per layer, whatever the number of processes.

    >>> import torch.distributed as dist, normkit as nk
    >>> model = nk.BatchNorm1d(3)
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> print(nk.merge_statistics_(model).verdict)
    merge_statistics_: nothing was changed; 1 skipped.
    >>> dist.destroy_process_group()
    """
    return operate(plan(model, process_group, filter_fn=filter_fn), dry_run=dry_run)


def plan(model: nn.Module, process_group: Any = None, *, filter_fn: Filter | None = None) -> Plan:
    """What :func:`merge_statistics_` would do. Nothing is changed, but the processes exchange what they have."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"merge_statistics_: {type(model).__name__} is not a torch.nn.Module.\n  give the model itself")
    if not initialised():
        raise RuntimeError(
            "merge_statistics_: torch.distributed is not initialised, so there is nothing to merge with.\n"
            "  call it in every process of a program started by torchrun, after init_process_group()"
        )
    intended = Plan("merge_statistics_", model)
    layers: dict[str, Any] = {}
    for name, module in model.named_modules():
        if not isinstance(module, _NORMS) or module.running_mean is None or is_lazy(module.running_mean):
            continue
        if filter_fn is not None and not filter_fn(module, name):
            intended.skip(name, "filter_fn left it out")
        else:
            layers[name] = module
    same_everywhere("merge_statistics_", layers, process_group, model)
    sets = {name: sets_of(layer) for name, layer in layers.items()}
    pooled = iter(_pooled([kept for one in sets.values() for kept in one], process_group))
    for name, one in sets.items():
        new = [next(pooled) for _ in one]
        edit = Overwrite([pair for kept, values in zip(one, new, strict=True) for pair in _pairs(kept, values)])
        if not any(values is not None for values in new):
            intended.skip(name, "no process has seen a batch")
        elif edit.changes_nothing():
            intended.skip(name, "its statistics are those of all processes already")
        else:
            reason = "what other processes saw counts as much"
            intended.add(Prescription("statistics merged", name, reason, "train_identical"), edit)
    return intended


def sets_of(layer: Any) -> list[Kept]:
    """The running statistics of a layer: its own, and those of every step or domain where it keeps such."""
    batches = None if isinstance(layer, _INSTANCE) else layer.num_batches_tracked  # which torch does not count there
    values = getattr(layer, "num_values_tracked", None)
    spread = not isinstance(layer, _INSTANCE)
    own = Kept(layer.running_mean, layer.running_var, layer.momentum, batches, values=values, spread=spread)
    state = layer._modules.get(PREFIX)
    rows = [state.kept(layer, row) for row in range(len(state.mean))] if isinstance(state, Table) else []
    return [own, *filter(None, rows)]


def _pairs(kept: Kept, values: tuple[Tensor, Tensor] | None) -> list[tuple[Tensor, Tensor]]:
    return [] if values is None else list(zip((kept.mean, kept.var), values, strict=True))


def same_everywhere(operation: str, layers: dict[str, Any], group: Any, model: nn.Module) -> None:
    """Refuse processes whose layers differ: what they exchange would not belong together."""
    told = [f"{name}: {[len(kept.mean) for kept in sets_of(layer)]} {layer.momentum}" for name, layer in layers.items()]
    digest = int.from_bytes(hashlib.sha256("\n".join(told).encode()).digest()[:7])
    ends = torch.tensor([digest, -digest], device=_device([*layers.values()], model))
    dist.all_reduce(ends, dist.ReduceOp.MAX, group)
    if ends[0] != -ends[1]:
        first = "; ".join(told[:3]) + (" ..." if told[3:] else "")
        raise RuntimeError(
            f"{operation}: the processes have different layers; nothing was changed.\n"
            f"  rank {dist.get_rank()} has {len(told)} with running statistics: {first}\n"
            "  give the same model, and the same filter_fn=, in every process (names, channels and momentum must agree)"
        )


def _device(layers: list[Any], model: nn.Module) -> torch.device:
    """Where processes exchange something about the layers: NCCL sends nothing that is on the CPU."""
    if layers:
        device: torch.device = layers[0].running_mean.device
        return device
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def _pooled(sets: list[Kept], group: Any) -> list[tuple[Tensor, Tensor] | None]:
    """Mean and variance of all processes, in float64; ``None`` where nobody has seen a batch."""
    if not sets:
        return []
    device = sets[0].mean.device
    wide = lambda tensor: tensor.detach().to(device, torch.float64)
    weights = torch.stack(_weights(sets, device, group))
    sizes = [len(kept.mean) for kept in sets]
    count = weights.repeat_interleave(torch.tensor(sizes, device=device))
    mean, var = torch.cat([wide(kept.mean) for kept in sets]), torch.cat([wide(kept.var) for kept in sets])
    used = count > 0  # what nobody reached may be anything
    own = Moments(count, torch.where(used, mean, 0), torch.where(used, var * count, 0))
    merged = own.exchange(group)
    var = merged.var()
    if not all(kept.spread for kept in sets):  # these are averages of variances, and stay such
        spread = torch.tensor([kept.spread for kept in sets], device=device)
        within = own.m2.clone()
        dist.all_reduce(within, group=group)
        of_each = spread.repeat_interleave(torch.tensor(sizes, device=device))
        var = torch.where(of_each, var, within / merged.count.clamp(min=1))
    parts = zip(*(t.split(sizes) for t in (merged.count, merged.mean, var)), strict=True)
    return [(mean, var) if bool((total > 0).all()) else None for total, mean, var in parts]


def _weights(sets: list[Kept], device: torch.device, group: Any) -> list[Tensor]:
    """How much the statistics of this process count, per set."""
    zero = torch.zeros((), dtype=torch.float64, device=device)
    number = lambda counter: zero if counter is None else counter.detach().to(zero)
    batches = [number(kept.tracked) if kept.tracked is not None else zero + 1 for kept in sets]
    values = [number(kept.values) for kept in sets]
    unknown = torch.stack([((b > 0) & (v == 0)).to(zero) for b, v in zip(batches, values, strict=True)])
    dist.all_reduce(unknown, group=group)  # where one process knows of batches only, all go by batches
    return [
        (b > 0).to(zero) if kept.momentum is not None else torch.where(u > 0, b, v)
        for kept, b, v, u in zip(sets, batches, values, unknown, strict=True)
    ]


@dataclass
class Overwrite:
    """Write values into tensors. An edit of :mod:`normkit.surgery.operate`."""

    pairs: list[tuple[Tensor, Tensor]]
    before: list[Tensor] = field(init=False, default_factory=list)

    def changes_nothing(self) -> bool:
        return all(torch.equal(place, value.to(place)) for place, value in self.pairs)

    def apply(self) -> None:
        self.before = [place.detach().clone() for place, _ in self.pairs]
        with torch.no_grad():
            for place, value in self.pairs:
                place.copy_(value)

    def objections(self) -> list[str]:
        return [] if self.changes_nothing() else ["its statistics have moved since"]

    def revert(self) -> None:
        with torch.no_grad():
            for (place, _), value in zip(self.pairs, self.before, strict=True):
                place.copy_(value)
