"""Collect: one set of hooks for all that is wanted of a forward pass, and one transfer for all its numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn, optim

from normkit.measure import activations, evaluations, gradients, neighbours, precision, statistics, structure, updates
from normkit.measure.asked import asked_for
from normkit.measure.feeding import Feeding
from normkit.measure.observer import Observer, Seen
from normkit.measure.quantities import QUANTITIES
from normkit.measure.running import Call, Loss, Run, runner
from normkit.measure.sites import carried_out
from normkit.measure.untouched import copied, in_mode, original, untouched
from normkit.vocabulary.reading import Reading

OBSERVERS: tuple[Observer, ...] = (statistics.OBSERVER, precision.OBSERVER, activations.OBSERVER)

Pending = list[tuple[str, str, Tensor]]
"""Quantity, module and a tensor of no axes, whose value nobody has waited for yet."""


class Collection:
    """Hooks on a model, for as long as the context is open; what they have seen is in :meth:`pending`.

    Of a module that is called several times the last call counts.

    Args:
        model: not compiled, or at rest in :func:`normkit.measure.untouched.untouched`: compiled code hears no hooks.
        quantities: names; those that no forward pass shows are nobody's business here.
    """

    def __init__(self, model: nn.Module, quantities: Iterable[str]) -> None:
        self.model, self.quantities = model, frozenset(quantities)
        self._found: dict[tuple[str, str], Tensor] = {}
        self._handles: list[Any] = []
        self._feeding = Feeding()

    def __enter__(self) -> Collection:
        inside = carried_out(self.model)
        for name, module in self.model.named_modules():
            if id(module) in inside:
                continue
            for observer in OBSERVERS:
                wanted = self.quantities & {quantity.name for quantity in observer.quantities}
                if wanted and observer.listens_to(module):
                    self._handles.append(self._listen(observer, name, module, wanted))
            if updates.EFFECTIVE in self.quantities:
                self._handles += self._feeding.listen(name, module)
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _listen(self, observer: Observer, name: str, module: nn.Module, wanted: frozenset[str]) -> Any:
        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any = None) -> None:
            self._note(observer, name, Seen(module, args, kwargs, output), wanted)

        if observer.before:
            return module.register_forward_pre_hook(note, with_kwargs=True)
        return module.register_forward_hook(note, with_kwargs=True)

    @torch.no_grad()
    def _note(self, observer: Observer, name: str, seen: Seen, wanted: frozenset[str]) -> None:
        device = next((t.device.type for t in (seen.output, seen.input) if isinstance(t, Tensor)), "cpu")
        cast = (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
        with torch.autocast(device, enabled=False):
            found = observer.read(replace(seen, cast=cast), wanted)
        self._found.update({(quantity, name): value for quantity, value in found.items()})

    @property
    def before_norms(self) -> dict[str, str]:
        """By name of a weight whose output a norm was given that takes its scale away, that norm."""
        return self._feeding.before_norms

    def pending(self) -> Pending:
        """What was seen so far, in the order of the first calls."""
        return [(quantity, name, value) for (quantity, name), value in self._found.items()]


def packed(pending: Iterable[tuple[str, str, Tensor]], step: int | None = None) -> list[Reading]:
    """Readings of all that is pending."""
    pending = list(pending)
    values = fetched([value for _, _, value in pending])
    return [
        Reading(quantity, value, module, step, QUANTITIES[quantity].unit)
        for (quantity, module, _), value in zip(pending, values, strict=True)
    ]


def fetched(tensors: Sequence[Tensor]) -> list[float]:
    """What is in tensors of one element: one buffer and one transfer per device, however many they are."""
    values: dict[int, float] = {}
    for device in {tensor.device for tensor in tensors}:
        places = [place for place, tensor in enumerate(tensors) if tensor.device == device]
        dtype = torch.float32 if device.type == "mps" else torch.float64
        buffer = torch.stack([tensors[place].detach().to(dtype).reshape(()) for place in places])
        values.update(zip(places, buffer.tolist(), strict=True))
    return [values[place] for place in range(len(tensors))]


def measure(
    model: nn.Module,
    batch: Any = None,
    *,
    loss_fn: Loss | None = None,
    optimizer: optim.Optimizer | None = None,
    quantities: Iterable[str] | None = None,
    call: Call | None = None,
) -> list[Reading]:
    """What normalization does inside a model, in numbers, and the model is left bit for bit as it was.

    Without a batch, what can be read off the model; with one, what a forward pass in training shows, and how far
    apart the outputs in training, by running statistics and by batch statistics are; with a loss, its gradients.

    The model is run as it is trained: where some part of it is in training mode, with the modes that it has; otherwise
    all of it in training mode. Hooks that are on the model run as in any forward pass. ``.grad`` is left alone. Where
    layers exchange statistics between processes, all processes have to measure.

    Args:
        model: a model or a layer; a compiled one is measured uncompiled.
        batch: what a loader gives: a tensor, ``(input, target)``, or a dict, of which the model gets the keys that its
            forward has. An input may itself be a tuple of positional arguments or a dict of keyword arguments.
        loss_fn: ``loss_fn(output, target)``; of a batch that is a dict or a tensor, the target is the whole batch, as
            in ``lambda output, batch: output.loss``.
        optimizer: gives learning rates.
        quantities: names out of :data:`normkit.measure.QUANTITIES`; ``None``: all that the arguments allow.
        call: how the model is run, ``call(model, batch)``, where the batch is of no such kind.

    Returns:
        One reading for each quantity and place. Of a module that is called several times, the last call's.

    Raises:
        ValueError: an unknown quantity, or one that needs an argument which was not given; lazy parameters.

    >>> import torch, normkit as nk
    >>> from normkit.measure import measure
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), nk.BatchNorm1d(8), torch.nn.ReLU())
    >>> readings = measure(model, torch.randn(32, 4), quantities=["values_per_channel"])
    >>> [(reading.module, reading.value, reading.unit) for reading in readings]
    [('1', 32.0, 'values')]
    """
    model = original(model)
    wanted = asked_for(quantities, batch=batch is not None, loss=loss_fn is not None, optimizer=optimizer is not None)
    readings: list[Reading] = []
    if wanted & {quantity.name for quantity in structure.QUANTITIES}:
        readings += structure.read_structure(model, optimizer)
    if wanted & {quantity.name for quantity in neighbours.QUANTITIES}:
        readings += neighbours.read_neighbours(model, batch, call)[0]
    readings = [reading for reading in readings if reading.quantity in wanted]
    return [*readings, *_numbers(model, batch, loss_fn, optimizer, call, wanted)]


def numbers(
    model: nn.Module,
    batch: Any = None,
    *,
    loss_fn: Loss | None = None,
    optimizer: optim.Optimizer | None = None,
    call: Call | None = None,
) -> list[Reading]:
    """As :func:`measure`, without the structure of the model: for who has read it already."""
    wanted = asked_for(None, batch=batch is not None, loss=loss_fn is not None, optimizer=optimizer is not None)
    return _numbers(original(model), batch, loss_fn, optimizer, call, wanted)


def _numbers(
    model: nn.Module,
    batch: Any,
    loss_fn: Loss | None,
    optimizer: optim.Optimizer | None,
    call: Call | None,
    wanted: frozenset[str],
) -> list[Reading]:
    taken = wanted | {updates.ALONG} if updates.EFFECTIVE in wanted else wanted
    pending: Pending = list(statistics.read_off(model, taken))
    if batch is not None:
        run = runner(loss_fn, call)
        if any(taken & {quantity.name for quantity in family} for family in _IN_TRAINING):
            pending += _training(model, batch, run, taken, optimizer)
        pending += evaluations.read(model, batch, run, taken)
    return [reading for reading in updates.only_scale_free(packed(pending)) if reading.quantity in wanted]


_IN_TRAINING = (
    statistics.BATCH,
    precision.QUANTITIES,
    activations.QUANTITIES,
    gradients.QUANTITIES,
    updates.QUANTITIES,
)
"""What the one pass in training has."""


def _training(
    model: nn.Module, batch: Any, run: Run, wanted: frozenset[str], optimizer: optim.Optimizer | None
) -> Pending:
    """One pass in training, with its gradients where they are wanted."""
    backward = any(quantity.name in wanted for quantity in gradients.QUANTITIES)
    with contextlib.ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.enter_context(in_mode(model, None))
        stack.enter_context(torch.set_grad_enabled(backward))
        collection = stack.enter_context(Collection(model, wanted))
        _, loss = run(model, copied(batch))
        pending = collection.pending()
        if optimizer is not None:
            pending += updates.effective(model, updates.learning_rates(model, optimizer), collection.before_norms)
        if backward and loss is not None:
            pending += gradients.read(gradients.of_loss(model, loss), wanted)
    return pending
