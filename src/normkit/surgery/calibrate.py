"""``nk.calibrate_``: running statistics as those of the data, for weights that stand still."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normkit.statistics.batch import Batch
from normkit.statistics.buffers import RunningStatistics
from normkit.statistics.ghost import Ghost
from normkit.statistics.synchronized import Synchronized, initialised
from normkit.surgery import batches, probe
from normkit.surgery.collect import Pooled, collecting, pool
from normkit.surgery.drift import drifts
from normkit.surgery.merge import Overwrite, same_everywhere
from normkit.surgery.operate import Plan, operate
from normkit.surgery.wrappers import inside, uncompiled
from normkit.vocabulary.certificate import Certificate
from normkit.vocabulary.prescription import Prescription, Safety
from normkit.vocabulary.reading import Reading

Filter = Callable[[nn.Module, str], bool]
_NORMS = nn.modules.batchnorm._NormBase
DRIFT, DEVIATIONS = "drift", "standard deviations"


def calibrate_(
    model: nn.Module,
    loader: Iterable[Any],
    steps: int | None = 200,
    call: batches.Call | None = None,
    keep_if: Callable[[nn.Module], float] | None = None,
    process_group: Any = None,
    *,
    filter_fn: Filter | None = None,
    progress: batches.Progress | None = None,
    dry_run: bool = False,
) -> Certificate:
    """Re-estimate the running statistics of a model from data: once its weights were averaged, pruned, loaded, moved.

    Mean and (unbiased) variance of all values together that come by a layer, in whatever batches they come: a batch of
    2 counts 2, and the spread between batches is in the variance. While this runs, each layer normalises by its batch,
    as in training, and everything else (dropout ...) is in evaluation mode. Instance norms that track get the averages
    over all samples. Buffers change in place at the end, all at once; modes and the random state are put back.

    Args:
        model: of torch's or normkit's layers; ``torch.optim.swa_utils.AveragedModel``, an EMA copy, or wrapped in
            DistributedDataParallel as it may be.
        loader: any iterable of batches; one that is shorter than ``steps`` is used up.
        steps: how many batches at most; ``None``: all.
        call: ``(model, batch)`` runs the model. Default: a tensor is the input; of ``(input, target)`` it is the first;
            a dict is given as keyword arguments, as far as the forward has them.
        keep_if: ``model -> float``, better when higher, called in evaluation mode before and after. Where the old
            statistics are better (or the new are not a number), they stay.
        process_group: of ``torch.distributed``, where it is initialised; ``None``: all processes. Each calls this with
            its own share of the data, and all get the statistics of all.
        filter_fn: ``(module, name) -> bool``: which layers; default all that keep running statistics.
        progress: called as ``progress(batches done, batches in all or None)`` after each batch.
        dry_run: change nothing, and return what would be done.

    Returns:
        Which layers were calibrated; which were not, and why: frozen ones (``nk.freeze_``, or in evaluation mode inside
        a model in training mode), those that no batch came by. ``readings`` has the drift of each layer before and
        after, on a few batches: how far the distribution that it sees in evaluation is from the one it assumes, as
        the 2-Wasserstein distance of normal distributions in the latter's standard deviations (root mean square over
        channels). ``undo()`` puts the old statistics back.

    Raises:
        ValueError: no batches, or ``steps`` below 1.
        TypeError: a batch that wants ``call=``; a TorchScript model.

    >>> import torch, normkit as nk
    >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1))
    >>> certificate = nk.calibrate_(model, [torch.zeros(100, 1), torch.full((2, 1), 10.0)])
    >>> round(model[0].running_mean.item(), 3)
    0.196

    When not to use it: the running statistics of a training run that has ended are good already where its last steps
    were small and its batches large (docs/calibrate.md has such a case); where the data of ``loader`` are augmented or
    sampled in another way than those met in use.

    Source: Izmailov et al. 2018, arXiv:1803.05407, section 3.2; Wu & Johnson 2021, arXiv:2105.07576, on pooling.
    """
    intended = plan(model, loader, steps, call, keep_if, process_group, filter_fn=filter_fn, progress=progress)
    return operate(intended, dry_run=dry_run)


def plan(
    model: nn.Module,
    loader: Iterable[Any],
    steps: int | None = 200,
    call: batches.Call | None = None,
    keep_if: Callable[[nn.Module], float] | None = None,
    process_group: Any = None,
    *,
    filter_fn: Filter | None = None,
    progress: batches.Progress | None = None,
) -> Plan:
    """What :func:`calibrate_` would do. The model runs, and is put back."""
    if steps is not None and steps < 1:
        raise ValueError(f"calibrate_: steps={steps}; it is a number of batches, 1 or more, or None for all there are")
    intended = Plan("calibrate_", inside(model, "calibrate_"))
    layers = _layers(intended, filter_fn)
    if initialised():
        same_everywhere("calibrate_", layers, process_group, model)
    if not layers:
        intended.notes.append("there is no layer whose running statistics could be re-estimated")
        return intended
    feed = batches.Feed(loader, steps, call or batches.call, progress)
    with probe.restored(intended.model), torch.no_grad(), uncompiled(intended.model):
        intended.model.eval()
        score = _Score(keep_if, model, process_group)
        score.read()
        with probe.restored(intended.model), collecting(layers) as found:
            for batch in feed:
                feed.call(intended.model, batch)
            pooled = pool(found, process_group)
        if initialised():
            feed.done = int(_summed(feed.done, intended.model, process_group))
        if not feed.done:
            raise ValueError(
                "calibrate_: the loader gave no batch; nothing was changed.\n"
                "  a generator that has been used before is empty: make it anew"
            )
        intended.model.eval()
        edits = {name: Overwrite(_pairs(sets)) for name, sets in pooled.items()}
        before = drifts(intended.model, layers, feed)
        for edit in edits.values():
            edit.apply()
        after = drifts(intended.model, layers, feed)
        score.read()
    kept_old = score.old_is_better()
    for name, sets in pooled.items():
        drift = f"drift {before[name]:.2g} before, {after[name]:.2g} after" if name in after else ""
        if not any(one.count for one in sets):
            reached = found[name].calls[None]
            intended.skip(name, "no batch was finite there" if reached else "no batch came by")
        elif kept_old:
            intended.skip(name, f"keep_if found the old statistics better; {drift}")
        elif edits[name].changes_nothing():
            intended.skip(name, "its statistics are those of these batches already")
        else:
            reason = "its statistics are those of the weights as they are"
            intended.add(Prescription("statistics calibrated", name, reason, _safety(layers[name]), drift), edits[name])
    intended.readings += [
        Reading(f"{DRIFT} {when}", value, name, unit=DEVIATIONS)
        for when, drifts in (("before", before), ("after", after))
        for name, value in drifts.items()
    ]
    intended.readings += score.readings()
    intended.notes += [*feed.words(), *_worst(before, after), *score.words()]
    return intended


def _layers(intended: Plan, filter_fn: Filter | None) -> dict[str, Any]:
    layers: dict[str, Any] = {}
    for name, module in intended.model.named_modules():
        if not isinstance(module, _NORMS):
            if isinstance(module._buffers.get("running_mean"), Tensor):
                kind = type(module)
                intended.skip(name, f"{kind.__module__}.{kind.__qualname__} is no batch or instance norm of torch's")
            continue
        if module.running_mean is None:
            continue
        if reason := _reason_to_skip(intended.model, module, name, filter_fn):
            intended.skip(name, reason)
        else:
            layers[name] = module
    return layers


def _reason_to_skip(model: nn.Module, module: Any, name: str, filter_fn: Filter | None) -> str | None:
    if filter_fn is not None and not filter_fn(module, name):
        return "filter_fn left it out"
    if is_lazy(module.running_mean):
        return "its size is not known yet; run one batch through the model first"
    if not module.track_running_stats:
        return "track_running_stats is off"
    if isinstance(module, RunningStatistics) and (module.frozen or module.hold.frozen):
        return "it is frozen"
    if model.training and not module.training:
        return "it is in evaluation mode inside a model in training mode, so somebody froze it; .train() it first"
    return None


@dataclass
class _Score:
    """What ``keep_if`` says of the model, before and after; of several processes, on average."""

    metric: Callable[[nn.Module], float] | None
    model: nn.Module
    group: Any
    values: list[float] = field(default_factory=list)

    def read(self) -> None:
        if self.metric is not None:
            self.model.eval()
            value = float(self.metric(self.model))
            if initialised():
                value = _summed(value, self.model, self.group) / dist.get_world_size(self.group)
            self.values.append(value)
            self.model.eval()

    def old_is_better(self) -> bool:
        if not self.values:
            return False
        before, after = self.values
        return not after >= before and not math.isnan(before)

    def readings(self) -> list[Reading]:
        return [Reading(f"keep_if {when}", v) for when, v in zip(("before", "after"), self.values, strict=False)]

    def words(self) -> Iterator[str]:
        if self.values:
            which = "old" if self.old_is_better() else "new"
            yield f"keep_if: {self.values[0]:.4g} before, {self.values[1]:.4g} after; the {which} statistics stay"


def _summed(value: float, model: nn.Module, group: Any) -> float:
    place = next(itertools.chain(model.buffers(), model.parameters())).device
    total = torch.tensor(value, dtype=torch.float64, device=place)
    dist.all_reduce(total, group=group)
    return total.item()


def _pairs(sets: list[Pooled]) -> list[tuple[Tensor, Tensor]]:
    """Where to write what. The counters say afterwards what the statistics are made of."""
    pairs = []
    for one in sets:
        if not one.count:
            continue
        pairs += [(one.kept.mean, one.mean), (one.kept.var, one.var)]
        for counter, number in ((one.kept.tracked, one.calls), (one.kept.values, round(one.count))):
            if counter is not None:
                pairs.append((counter, torch.tensor(number)))
    return pairs


def _safety(layer: Any) -> Safety:
    """Other policies normalise by the running statistics in training too."""
    policy = getattr(layer, "statistics", None)
    return "train_identical" if isinstance(policy, Batch | Ghost | Synchronized | None) else "retrain"


def _worst(before: dict[str, float], after: dict[str, float]) -> Iterator[str]:
    if before and after:
        told = [f"{max(d.values()):.2g} ({max(d, key=lambda name: d[name]) or 'the model'})" for d in (before, after)]
        yield f"greatest drift, in {DEVIATIONS}: {told[0]} before, {told[1]} after"
