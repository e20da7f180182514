"""nk.watch: what normalization does during a training run, without a line in the loop and without changing a bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn, optim

from normkit.integrations.trackers import Trackers
from normkit.watching.quantities import ALL, usual
from normkit.watching.sample import Held, Wanted
from normkit.watching.spacing import Spacing
from normkit.watching.watcher import Watch


def watch(
    model: nn.Module,
    optimizer: optim.Optimizer,
    every: int = 50,
    out: str | Path | None = "runs/watched",
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    trackers: Iterable[Any] = (),
    budget: float | None = 0.02,
    *,
    quantities: Iterable[str] | None = None,
    batch: Any = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    process_group: Any = None,
    step: int = 0,
) -> Watch:
    """Watch a training run: one line before the loop, and nothing in it.

    On sampled steps, and only there, it reads the gradients and the update of the step, and repeats the forward pass on
    the batch that came by, on copies of the buffers and with random numbers of its own. All numbers of a sample are
    fetched at once. The run is bit for bit what it would have been; :meth:`Watch.close` leaves no trace.

    What costs more than ``budget`` of the training time is sampled less often: a sample that takes as long as two steps
    is taken every hundred steps at 2 %. What it did cost is in the report, in the log and in ``repr(watch)``.

    Findings are said when they come up, to the log ``normkit.watch`` and to the trackers. At the end of the program, or
    at :meth:`Watch.close`, the report is in ``out``/report.html; ``normkit doctor runs/a`` makes it at any time.

    Args:
        model: what the loop calls: the model, ``torch.compile`` of it, or DistributedDataParallel around either.
        optimizer: its ``step()`` ends a training step, so gradient accumulation needs nothing more.
        every: steps between two samples, at least.
        out: the directory of the run; one that holds a run stays, and ``out-2`` is taken. ``None``: nothing is written.
        filter_fn: ``(module, name)``: which modules are reported, by default all.
        trackers: whatever has ``.log(dict, step=)`` or ``.add_scalar(name, value, step)``.
        budget: greatest share of the training time; ``None``: ``every`` is kept, whatever it costs.
        quantities: names out of ``normkit.measure.QUANTITIES``; by default all but the dear ones.
        batch: a batch that is measured with ``loss_fn`` at every sample, best of validation data: the loss in training,
            by running statistics and by batch statistics, over the run.
        loss_fn: ``loss_fn(output, target)`` for ``batch``.
        process_group: the processes that train this model, where ``model`` is no DistributedDataParallel.
        step: how many steps are already done, for a run that is resumed; it goes on in the same ``out``.

    Returns:
        A :class:`Watch`, which is a context manager. It need not be kept.

    Raises:
        ValueError: a number out of its range, an unknown quantity, ``batch`` without ``loss_fn``.
        TypeError: no model, or a sharded one; no optimizer; a tracker that cannot log.

    >>> import torch, normkit as nk
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), nk.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with nk.watch(model, optimizer, every=2, out=None, budget=None) as watched:
    ...     for _ in range(4):
    ...         optimizer.zero_grad()
    ...         model(torch.randn(16, 4)).square().mean().backward()
    ...         optimizer.step()
    >>> watched.steps, watched.samples
    (4, 2)

    When not to use it: where a step takes less than a millisecond, nearly all of a sample is overhead and samples are
    thousands of steps apart; give ``budget=None`` for a short run that is only looked at.
    """
    _check(every, budget, batch, loss_fn, quantities)
    names = usual() if quantities is None else frozenset(quantities)
    held = None if batch is None or loss_fn is None else Held(batch, loss_fn)
    asked = Wanted(names, filter_fn, held)
    return Watch(model, optimizer, asked, Spacing(every, budget, step), out, Trackers(trackers), process_group)


def _check(every: int, budget: float | None, batch: Any, loss_fn: Any, quantities: Iterable[str] | None) -> None:
    if every < 1:
        raise ValueError(f"watch: every={every} is no number of steps.\n  give 1 or more")
    if budget is not None and not 0 < budget < 1:
        raise ValueError(f"watch: budget={budget} is no share of the training time.\n  give 0.02 for 2 %, or None")
    if (batch is None) != (loss_fn is None):
        there, missing = ("batch", "loss_fn") if loss_fn is None else ("loss_fn", "batch")
        raise ValueError(f"watch: {there}= was given without {missing}=.\n  give both, or neither")
    for name in quantities or ():
        if name not in ALL or ALL[name].stage == "probe":
            choose = ", ".join(sorted(name for name in ALL if ALL[name].stage != "probe"))
            raise ValueError(f"watch: there is no quantity {name!r} of a run.\n  choose from: {choose}")
