"""Collect: one set of hooks for all that is wanted of a forward pass, and one transfer for all its numbers."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn, optim

from normkit.measure import activations, evaluations, gradients, statistics
from normkit.measure.observer import Observer, Seen
from normkit.measure.quantities import QUANTITIES
from normkit.measure.untouched import copied, in_mode, original, untouched
from normkit.norm import Norm
from normkit.surgery import batches
from normkit.vocabulary.quantity import Stage
from normkit.vocabulary.reading import Reading

OBSERVERS: tuple[Observer, ...] = (statistics.OBSERVER, activations.OBSERVER)

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

    def __enter__(self) -> Collection:
        carried_out = {id(module.activation) for module in self.model.modules() if isinstance(module, Norm)}
        for name, module in self.model.named_modules():
            if id(module) in carried_out:  # its values are those of the norm, and a hook would part it from the kernel
                continue
            for observer in OBSERVERS:
                wanted = self.quantities & {quantity.name for quantity in observer.quantities}
                if wanted and observer.listens_to(module):
                    self._handles.append(self._listen(observer, name, module, wanted))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _listen(self, observer: Observer, name: str, module: nn.Module, wanted: frozenset[str]) -> Any:
        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self._note(observer, name, Seen(module, args, kwargs), wanted)

        def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            self._note(observer, name, Seen(module, args, kwargs, output), wanted)

        if observer.before:
            return module.register_forward_pre_hook(before, with_kwargs=True)
        return module.register_forward_hook(after, with_kwargs=True)

    @torch.no_grad()
    def _note(self, observer: Observer, name: str, seen: Seen, wanted: frozenset[str]) -> None:
        device = next((t.device.type for t in (seen.output, seen.input) if isinstance(t, Tensor)), "cpu")
        with torch.autocast(device, enabled=False):
            found = observer.read(seen, wanted)
        self._found.update({(quantity, name): value for quantity, value in found.items()})

    def pending(self) -> Pending:
        """What was seen so far, in the order of the first calls."""
        return [(quantity, name, value) for (quantity, name), value in self._found.items()]


def packed(pending: Iterable[tuple[str, str, Tensor]], step: int | None = None) -> list[Reading]:
    """Readings of all that is pending: one buffer and one transfer per device, however many layers there are."""
    pending = list(pending)
    values: dict[int, float] = {}
    for device in {value.device for _, _, value in pending}:
        places = [place for place, (_, _, value) in enumerate(pending) if value.device == device]
        dtype = torch.float32 if device.type == "mps" else torch.float64
        buffer = torch.stack([pending[place][2].detach().to(dtype) for place in places])
        values.update(zip(places, buffer.tolist(), strict=True))
    return [
        Reading(quantity, values[place], module, step, QUANTITIES[quantity].unit)
        for place, (quantity, module, _) in enumerate(pending)
    ]


def measure(
    model: nn.Module,
    batch: Any = None,
    *,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    optimizer: optim.Optimizer | None = None,
    quantities: Iterable[str] | None = None,
    call: batches.Call | None = None,
) -> list[Reading]:
    """What normalization does inside a model, in numbers, and the model is left bit for bit as it was.

    Without a batch, what can be read off the model; with one, what a forward pass in training shows, and how far
    apart the outputs in training, by running statistics and by batch statistics are; with a loss, its gradients.

    The model is run as it is trained: where some part of it is in training mode, with the modes that it has; otherwise
    all of it in training mode. Hooks that are on the model run as in any forward pass. ``.grad`` is left alone.

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
    wanted = wanted_of(quantities, batch is not None, loss_fn is not None)
    pending: Pending = list(statistics.read_off(model, wanted))
    if batch is not None:
        run = _runner(loss_fn, call or batches.call)
        pending += _forward(model, batch, run, wanted)
        pending += evaluations.read(model, batch, run, wanted)
    return packed(pending)


def wanted_of(quantities: Iterable[str] | None, batch: bool, loss: bool) -> frozenset[str]:
    """The names that are asked for.

    Raises:
        ValueError: one is unknown, or needs what is not there.
    """
    stages: set[Stage] = {"model"} | ({"batch"} if batch else set()) | ({"gradients"} if batch and loss else set())
    if quantities is None:
        return frozenset(name for name, quantity in QUANTITIES.items() if quantity.stage in stages)
    wanted = frozenset(quantities)
    for name in sorted(wanted):
        if name not in QUANTITIES:
            near = difflib.get_close_matches(name, QUANTITIES, n=1, cutoff=0.5)
            suggestion = f"  did you mean {near[0]!r}?\n" if near else ""
            raise ValueError(
                f"there is no quantity named {name!r}.\n{suggestion}  choose from: {', '.join(sorted(QUANTITIES))}"
            )
        if (stage := QUANTITIES[name].stage) not in stages:
            raise ValueError(f"measure: {name} needs {_NEEDS[stage]}")
    return wanted


_NEEDS = {
    "batch": "a forward pass.\n  give batch=",
    "gradients": "a backward pass.\n  give batch= and loss_fn=",
    "run": "a run that is watched.\n  use normkit.watch",
    "probe": "passes of its own.\n  call the function of that name in normkit.measure",
}


def target_of(batch: Any) -> Any:
    """What the loss is given beside the output."""
    if isinstance(batch, tuple | list):
        return batch[1] if len(batch) == 2 else tuple(batch[1:])
    return batch


def _runner(loss_fn: Callable[[Any, Any], Tensor] | None, call: batches.Call) -> evaluations.Run:
    def run(model: nn.Module, batch: Any) -> tuple[Any, Tensor | None]:
        output = call(model, batch)
        return output, None if loss_fn is None else loss_fn(output, target_of(batch))

    return run


def _forward(model: nn.Module, batch: Any, run: evaluations.Run, wanted: frozenset[str]) -> Pending:
    """One pass in training, with its gradients where they are wanted."""
    backward = any(QUANTITIES[name].stage == "gradients" for name in wanted)
    with contextlib.ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.enter_context(in_mode(model, None))
        stack.enter_context(torch.set_grad_enabled(backward))
        collection = stack.enter_context(Collection(model, wanted))
        _, loss = run(model, copied(batch))
        pending = collection.pending()
        if backward and loss is not None:
            named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
            taken = torch.autograd.grad(loss, list(named.values()), allow_unused=True) if named else ()
            pairs = {name: (weight, grad) for (name, weight), grad in zip(named.items(), taken, strict=True)}
            pending += list(gradients.read(pairs, wanted))
    return pending
