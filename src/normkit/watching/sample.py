"""Sample: what is read at one step, of the step itself and of forward passes beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn, optim

from normkit.measure import evaluations, gradients, statistics, updates
from normkit.measure.collect import Collection, Pending, measure
from normkit.measure.untouched import copied, in_mode, untouched
from normkit.vocabulary.reading import Reading
from normkit.watching.quantities import ALL


@dataclass(frozen=True)
class Batch:
    """A batch that came by: what the model was called with, and under which autocast."""

    args: tuple
    kwargs: dict[str, Any]
    autocast: tuple[str, torch.dtype] | None
    """Type of the device, and the type that is cast to."""

    @classmethod
    def seen(cls, device: str, args: tuple, kwargs: dict[str, Any], *, copy: bool) -> Batch:
        """``copy``: in fresh memory, because model or loop may write over it before it is used."""
        cast = (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
        taken_args, taken_kwargs = copied((args, kwargs)) if copy else (args, kwargs)
        return cls(taken_args, taken_kwargs, cast)

    def run(self, model: nn.Module) -> Any:
        """The forward pass, as it was."""
        args, kwargs = copied((self.args, self.kwargs))
        with self._cast():
            return model(*args, **kwargs)

    def _cast(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(*self.autocast, cache_enabled=False)


@dataclass(frozen=True)
class Held:
    """A batch that is measured with its loss at every sample: of validation data, at best."""

    batch: Any
    loss_fn: Callable[[Any, Any], Tensor]


@dataclass
class Wanted:
    """What is asked for, and of which modules."""

    quantities: frozenset[str]
    filter_fn: Callable[[nn.Module, str], bool] | None = None
    held: Held | None = None
    _passed: dict[tuple[str, str], bool] = field(default_factory=dict)

    @property
    def of_a_batch(self) -> frozenset[str]:
        """The quantities that a forward pass shows."""
        return frozenset(n for n in self.quantities if ALL[n].stage == "batch" or n == updates.EFFECTIVE)

    def passed(self, model: nn.Module, pending: Pending) -> Pending:
        """What the filter lets through; a parameter goes with the module that owns it."""
        if self.filter_fn is None:
            return pending
        return [entry for entry in pending if self._passes(model, ALL[entry[0]].per, entry[1])]

    def _passes(self, model: nn.Module, per: str, name: str) -> bool:
        if per == "model":
            return True
        if (per, name) not in self._passed:
            owner = name.rpartition(".")[0] if per == "parameter" else name
            assert self.filter_fn is not None
            self._passed[per, name] = bool(self.filter_fn(model.get_submodule(owner), owner))
        return self._passed[per, name]


def of_the_step(model: nn.Module, wanted: Wanted) -> Pending:
    """What the backward pass has left, and what can be read off the norms."""
    found = [
        *gradients.read(gradients.of_step(model), wanted.quantities),
        *statistics.read_off(model, wanted.quantities),
    ]
    return wanted.passed(model, found)


def of_the_batch(model: nn.Module, optimizer: optim.Optimizer, batch: Batch, wanted: Wanted) -> Pending:
    """What forward passes on the batch that came by show: one in training, and three to compare."""
    names = wanted.of_a_batch
    if not names:
        return []
    with untouched(model), in_mode(model, None), torch.no_grad(), Collection(model, names) as collection:
        loss = _loss_of(batch.run(model))
        pending = collection.pending()
    if updates.EFFECTIVE in names:
        pending += updates.effective(model, updates.learning_rates(model, optimizer), collection.before_norms)

    def run(model: nn.Module, batch: Any) -> tuple[Any, Tensor | None]:
        output = batch.run(model)
        return output, None if loss is None else _loss_of(output)

    if wanted.held is None:
        pending += evaluations.read(model, batch, run, names)
    return wanted.passed(model, pending)


def of_the_held_batch(model: nn.Module, wanted: Wanted, step: int) -> list[Reading]:
    """The held batch in training, by running statistics and by batch statistics."""
    names = wanted.quantities & evaluations.NAMES
    if wanted.held is None or not names:
        return []
    found = measure(model, wanted.held.batch, loss_fn=wanted.held.loss_fn, quantities=names)
    return [Reading(r.quantity, r.value, r.module, step, r.unit) for r in found]


def _loss_of(output: Any) -> Tensor | None:
    """Models of transformers return their loss, where they were given labels."""
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    return loss.reshape(()) if isinstance(loss, Tensor) and loss.numel() == 1 else None
