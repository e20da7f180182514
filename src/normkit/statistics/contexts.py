"""Who may move running statistics, and when: not in these forward passes, or once for several of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, overload

from torch import nn, optim
from torch.nn.parameter import is_lazy

from normkit.statistics.buffers import Hold, RunningStatistics, waiting_for
from normkit.stepping import takes_its_step


@contextlib.contextmanager
def statistics_frozen(model: nn.Module) -> Iterator[None]:
    """Forward passes inside leave the running statistics of the model, and their counters, as they are.

    The batches are normalised as ever, in training by their own statistics: for a second loss term, Monte Carlo
    dropout, a warm-up, adversarial samples. Contexts nest. To normalise by the running statistics too, and for good:
    :func:`normkit.freeze_`.

    Args:
        model: a model, or one layer.

    Raises:
        TypeError: a layer that keeps running statistics is not normkit's, so nobody can hold it; nothing was done.

    >>> import torch, normkit as nk
    >>> model = torch.nn.Sequential(nk.BatchNorm1d(2))
    >>> with nk.statistics_frozen(model):
    ...     y = model(torch.randn(8, 2))
    >>> model[0].running_mean.tolist(), model[0].num_batches_tracked.item()
    ([0.0, 0.0], 0)
    """
    _layers(model, "statistics_frozen")
    found: list[Any] = [getattr(module, "hold", None) for module in model.modules()]
    holds = [hold for hold in found if isinstance(hold, Hold)]
    for hold in holds:
        hold.frozen += 1
    try:
        yield
    finally:
        for hold in holds:
            hold.frozen -= 1


@overload
def accumulate_statistics(model: nn.Module) -> contextlib.AbstractContextManager[None]: ...
@overload
def accumulate_statistics(model: nn.Module, *, optimizer: optim.Optimizer | Sequence[optim.Optimizer]) -> Listener: ...
def accumulate_statistics(model: nn.Module, *, optimizer: Any = None) -> Any:
    """Gradient accumulation: the running statistics move once per optimizer step, by all its micro-batches together.

    ``with nk.accumulate_statistics(model): ...`` around the micro-batches of one step, or
    ``nk.accumulate_statistics(model, optimizer=opt)`` once, after which every step of the optimizer ends an update.
    An update is what one batch with all those values would have done: mean and variance pooled exactly (the spread
    between micro-batches is in them), one move by ``momentum``, one count in ``num_batches_tracked``.

    Each micro-batch is still *normalised* by its own statistics. So a norm that sees the data as they are ends with the
    running statistics of the large batch; norms behind it saw what other norms made of smaller batches.

    What waits until the step leaves evaluation alone, and is dropped when the ``with`` ends in an exception. A step
    that is skipped (``torch.amp.GradScaler``) does not end an update: its micro-batches go in with the next step.

    Args:
        model: a model, or one layer.
        optimizer: one or several; whichever steps first ends the update.

    Returns:
        A context, which ends the update when it is left; inside another one it joins that. With ``optimizer``: a
        :class:`Listener`, whose ``remove()`` ends it.

    Raises:
        TypeError: a layer that keeps running statistics is not normkit's; not an optimizer of torch.
        RuntimeError: an optimizer is listened to for this model already.

    >>> import torch, normkit as nk
    >>> model = torch.nn.Sequential(nk.BatchNorm1d(1, momentum=1.0))
    >>> with nk.accumulate_statistics(model):
    ...     for micro_batch in torch.tensor([[0.0], [2.0], [4.0], [6.0]]).split(2):
    ...         y = model(micro_batch)
    >>> model[0].running_mean.item(), model[0].num_batches_tracked.item()
    (3.0, 1)
    """
    layers = _layers(model, "accumulate_statistics")
    if optimizer is None:
        return _around(layers)
    optimizers = [optimizer] if isinstance(optimizer, optim.Optimizer) else list(optimizer)
    for each in optimizers:
        if not isinstance(each, optim.Optimizer):
            raise TypeError(
                f"accumulate_statistics: optimizer={type(each).__name__} is no torch.optim.Optimizer.\n"
                "  give the optimizer of torch whose step() ends an update, or put the micro-batches of a step into "
                "`with normkit.accumulate_statistics(model):`"
            )
    return Listener(layers, optimizers)


@contextlib.contextmanager
def _around(layers: Sequence[RunningStatistics]) -> Iterator[None]:
    own = _begin(layers)
    try:
        yield
        _update(own)
    finally:
        _end(own)


class Listener:
    """Moves running statistics whenever an optimizer steps. Made by :func:`accumulate_statistics`.

    As a context it removes itself at the end.
    """

    def __init__(self, layers: Sequence[RunningStatistics], optimizers: Sequence[optim.Optimizer]) -> None:
        if any(layer.hold.pending is not None for layer in layers):
            raise RuntimeError(
                "accumulate_statistics: the statistics of this model wait for a step already.\n"
                "  call remove() on what the first call returned, or name all optimizers in one call: "
                "optimizer=[first, second]"
            )
        self._own = _begin(layers)
        update = lambda optimizer, *_: _update(self._own) if takes_its_step(optimizer) else None
        self._hooks = [optimizer.register_step_post_hook(update) for optimizer in optimizers]

    def remove(self) -> None:
        """Stop: every forward pass moves the statistics again. What waits for a step that did not come is dropped."""
        for hook in self._hooks:
            hook.remove()
        _end(self._own)
        self._hooks, self._own = [], []

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()


def _begin(layers: Sequence[RunningStatistics]) -> list[RunningStatistics]:
    """The layers that did not wait before: those that the caller has to end."""
    own = [layer for layer in layers if layer.hold.pending is None]
    for layer in own:
        layer.hold.pending = {}
        kept = layer.kept()
        if kept is not None and not is_lazy(kept.mean):
            waiting_for(kept)  # before compiled code comes by
    return own


def _update(layers: Sequence[RunningStatistics]) -> None:
    for layer in layers:
        for key, waiting in (layer.hold.pending or {}).items():
            kept = layer.kept() if key is None else waiting.kept
            if kept is not None:
                waiting.let_in(kept)


def _end(layers: Sequence[RunningStatistics]) -> None:
    for layer in layers:
        layer.hold.pending = None


def _layers(model: nn.Module, what: str) -> list[RunningStatistics]:
    """normkit's layers with running statistics.

    Raises:
        TypeError: there are layers with running statistics that are not normkit's.
    """
    foreign = [
        f"  {name or '(the model)'}: {type(module).__module__}.{type(module).__qualname__}"
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and not isinstance(module, RunningStatistics)
        if module.track_running_stats
    ]
    if foreign:
        raise TypeError(
            "\n".join(
                [
                    f"{what}: {len(foreign)} layers keep running statistics and are not normkit's; nothing was done.",
                    *foreign,
                    "  normkit.accelerate_(model) makes torch's layers normkit's, in place and with the same numbers; "
                    "normkit.sync_(model) does so with SyncBatchNorm",
                ]
            )
        )
    return [module for module in model.modules() if isinstance(module, RunningStatistics)]
