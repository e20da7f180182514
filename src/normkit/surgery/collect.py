"""One pass over data: what comes by the layers that keep running statistics, as moments of everything together."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from normkit.layout import roles
from normkit.moments import Moments
from normkit.statistics.batch import PLAIN
from normkit.statistics.buffers import Kept, Pending, RunningStatistics
from normkit.statistics.masking import as_mask
from normkit.statistics.renorm import Renorm
from normkit.statistics.running import Running
from normkit.statistics.synchronized import Synchronized, initialised
from normkit.surgery.merge import sets_of

INSTANCE = nn.modules.instancenorm._InstanceNorm


@dataclass
class Collected:
    """What came by one layer."""

    layer: Any
    pending: Pending = field(default_factory=dict)
    calls: Counter = field(default_factory=Counter)
    """How often, by ``Kept.key``."""


@dataclass(frozen=True)
class Pooled:
    """What one set of running statistics is to be."""

    kept: Kept
    count: float
    """Values per channel; of instance norm, samples. 0: none came by, or none that was finite."""
    calls: int
    mean: Tensor
    var: Tensor


@contextlib.contextmanager
def collecting(layers: dict[str, Any]) -> Iterator[dict[str, Collected]]:
    """While open, these layers normalise by the batch, and what comes by is merged; running statistics of normkit's
    layers wait, those of torch's move (the caller puts them back).

    Renorm and Running normalise by the running statistics that are about to be replaced; here they are batch norms.

    Raises:
        RuntimeError: the statistics wait for an optimizer already.
    """
    found = {name: Collected(layer) for name, layer in layers.items()}
    with contextlib.ExitStack() as stack:
        for name, one in found.items():
            handle = one.layer.register_forward_pre_hook(_watch(one), with_kwargs=True)
            stack.callback(handle.remove)
            one.layer.training = True  # of the layer alone: what it activates by stays in evaluation
            if _can_wait(one.layer):
                stack.enter_context(_waiting(name, one))
        yield found


@contextlib.contextmanager
def _waiting(name: str, one: Collected) -> Iterator[None]:
    layer, policy = one.layer, getattr(one.layer, "statistics", PLAIN)
    if layer.hold.pending is not None:
        raise RuntimeError(
            f"{name or 'the model'}: its statistics wait for an optimizer (normkit.accumulate_statistics).\n"
            "  leave that context first, or call remove() on what it returned"
        )
    layer.hold.pending = one.pending
    if isinstance(policy, Renorm | Running):
        layer.statistics = PLAIN
    try:
        yield
    finally:
        layer.hold.pending = None
        if isinstance(policy, Renorm | Running):
            layer.statistics = policy


def _can_wait(layer: Any) -> bool:
    """Whether its statistics can wait for more batches, as those of normkit's batch norms can, whatever they are.

    Those of an instance norm in bfloat16 may have been rounded on the way: its input is measured, as torch's is.
    """
    return isinstance(layer, RunningStatistics) and not isinstance(layer, INSTANCE)


def _watch(one: Collected) -> Any:
    """A hook that counts; where statistics cannot wait, it measures the input too."""
    own = None if _can_wait(one.layer) else replace(sets_of(one.layer)[0], pending=one.pending)

    def note(layer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        policy = getattr(layer, "statistics", None)
        kept = policy.kept(layer, kwargs.get("step")) if policy is not None else None
        one.calls.update({None, None if kept is None else kept.key})
        if own is not None:
            own.observe(moments_of(layer, args, kwargs))

    return note


def moments_of(layer: Any, args: tuple, kwargs: dict[str, Any]) -> Moments:
    """The moments, per channel, of what a layer is called with; of an instance norm, averages over the samples."""
    x = args[0] if args else kwargs["input"]
    given = [kwargs.get(name) for name in ("mask", "lengths")]
    instances = isinstance(layer, INSTANCE)
    if instances and x.dim() == layer._get_no_batch_dim():
        x = x.unsqueeze(0)
        given = [None if t is None else torch.as_tensor(t).unsqueeze(0) for t in given]
    mask = as_mask(x, *given, axes=roles("[n] c [s...]", x.dim())[2], what=type(layer).__name__)
    space = tuple(range(2, x.dim()))
    if not instances:
        return Moments.measure(x, (0, *space), mask)
    each = Moments.measure(x, space, mask)
    enough = (each.count >= 2).expand_as(each.mean)
    samples = enough.sum(0, dtype=torch.float64)
    average = lambda t: torch.where(enough, t, 0).sum(0) / samples.clamp(min=1).to(t.dtype)
    return Moments(samples, average(each.mean), average(each.var(1)) * samples.to(each.mean.dtype))


def pool(found: dict[str, Collected], group: Any) -> dict[str, list[Pooled]]:
    """What the running statistics are to be, by layer: of all processes where there are several. In float64."""
    sets = {name: sets_of(one.layer) for name, one in found.items()}
    parts = [_part(found[name], kept) for name, one in sets.items() for kept in one]
    calls = [found[name].calls[kept.key] for name, one in sets.items() for kept in one]
    if initialised() and parts:
        parts, calls = _exchanged(parts, calls, [kept for one in sets.values() for kept in one], group)
    merged = iter(zip(parts, calls, strict=True))
    return {name: [_pooled(kept, *next(merged)) for kept in one] for name, one in sets.items()}


def _pooled(kept: Kept, moments: Moments, calls: int) -> Pooled:
    mean, var = moments.unbiased() if kept.spread else (moments.mean, moments.var())
    least = float(moments.count.min()) if moments.count.numel() else 0.0
    return Pooled(kept, least, calls, mean, var)


def _part(one: Collected, kept: Kept) -> Moments:
    waiting = one.pending.get(kept.key)
    policy = getattr(one.layer, "statistics", None)
    shared = isinstance(policy, Synchronized) and not policy.alone() and dist.get_rank(policy.process_group) > 0
    if waiting is None or shared:  # what several processes have measured together counts once
        zeros = torch.zeros(kept.mean.shape, dtype=torch.float64, device=kept.mean.device)
        return Moments(zeros, zeros, zeros)
    return Moments(*waiting.moments)


def _exchanged(parts: list[Moments], calls: list[int], sets: list[Kept], group: Any) -> tuple[list[Moments], list[int]]:
    """All sets in one exchange. Of instance norm the variances are averaged as the means are."""
    rows = []
    for moments, kept in zip(parts, sets, strict=True):
        count = moments.count.expand_as(moments.mean)
        if kept.spread:
            rows.append((count, moments.mean, moments.m2))
        else:
            nothing = torch.zeros_like(moments.m2)
            rows += [
                (count, moments.mean, nothing),
                (count, Moments(count.clamp(min=1), moments.mean, moments.m2).var(), nothing),
            ]
    sizes = [len(row[0]) for row in rows]
    device = parts[0].mean.device
    together = Moments(*(torch.cat([t.to(device) for t in column]) for column in zip(*rows, strict=True)))
    merged = together.exchange(group)
    pieces = iter(zip(*(t.split(sizes) for t in (merged.count, merged.mean, merged.m2)), strict=True))
    found = []
    for moments, kept in zip(parts, sets, strict=True):
        count, mean, m2 = (t.to(moments.mean.device) for t in next(pieces))
        if not kept.spread:
            m2 = next(pieces)[1].to(count) * count
        found.append(Moments(count, mean, m2))
    number = torch.tensor(calls, device=device)
    dist.all_reduce(number, group=group)
    return found, number.tolist()
