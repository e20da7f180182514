"""How the batches of a loader are given to a model."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Call = Callable[[nn.Module, Any], Any]
"""Runs a model on one batch."""
Progress = Callable[[int, int | None], object]
"""Called with how many batches are done, and how many there will be, where that is known."""
_TOO_FEW = "more than 1 value per channel"  # torch's words
_HELD = 8  # batches that a feed keeps


def call(model: nn.Module, batch: Any) -> Any:
    """Run the model on a batch as loaders give it: a tensor, ``(input, target)``, or a dict.

    The input of a tuple is its first element, and may itself be a tuple of positional arguments or a dict of keyword
    arguments. Of a dict the model gets those keys that its forward has. Tensors go to the device of the model.

    Raises:
        TypeError: another kind of batch, or a dict without a key that the forward has.
    """
    args, kwargs = arguments(model, batch)
    return model(*_to(args, model), **_to(kwargs, model))


def arguments(model: nn.Module, batch: Any) -> tuple[tuple, dict[str, Any]]:
    """The positional and the keyword arguments in a batch."""
    if isinstance(batch, tuple | list) and batch:
        first = batch[0]
        return (tuple(first), {}) if isinstance(first, tuple | list) else arguments(model, first)
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), _keywords(model, batch)
    raise TypeError(
        f"a batch is a {type(batch).__name__}, and it is not clear what of it the model takes.\n"
        "  say it with call=lambda model, batch: model(batch.x), for example"
    )


def _keywords(model: nn.Module, batch: Mapping) -> dict[str, Any]:
    names = _names(model)
    found = dict(batch) if names is None else {name: batch[name] for name in names if name in batch}
    if not found:
        raise TypeError(
            f"a batch has the keys {', '.join(map(str, batch)) or '(none)'}, and the forward of {type(model).__name__} "
            f"takes {', '.join(names or ()) or 'nothing'}.\n"
            "  say what it gets with call=lambda model, batch: model(batch['image']), for example"
        )
    return found


def _names(model: nn.Module) -> list[str] | None:
    """What the forward can be given by name; ``None``: anything."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        inner = getattr(model, "module", None)  # AveragedModel and its like hand on what they get
        return _names(inner) if isinstance(inner, nn.Module) else None
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _length(loader: Iterable[Any]) -> int | None:
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except TypeError:  # a DataLoader of an iterable dataset has a length that cannot be asked for
        return None


def _to(arguments: Any, model: nn.Module) -> Any:
    places = {tensor.device for tensor in model.parameters()}
    if len(places) != 1:  # none to go by, or a model over several devices, which knows where its input goes
        return arguments
    (device,) = places
    if device.type == "meta":
        return arguments
    return pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, arguments)


class Feed:
    """The batches that are to be run, some of which are kept."""

    def __init__(self, loader: Iterable[Any], steps: int | None, call: Call, progress: Progress | None) -> None:
        self.loader, self.steps, self.run, self.progress = loader, steps, call, progress
        self.done = 0
        self.held: list[Any] = []
        self.stride = 1

    def __iter__(self) -> Iterator[Any]:
        known = [number for number in (_length(self.loader), self.steps) if number is not None]
        for batch in itertools.islice(self.loader, self.steps):
            self._hold(batch)
            yield batch
            self.done += 1
            if self.progress is not None:
                self.progress(self.done, min(known, default=None))

    def _hold(self, batch: Any) -> None:
        """Every batch at first, then every second, every fourth: never more than a few, and from all over the data."""
        if self.done % self.stride:
            return
        self.held.append(batch)
        if len(self.held) > _HELD:
            self.held = self.held[::2]
            self.stride *= 2

    def call(self, model: nn.Module, batch: Any) -> None:
        """Run one batch; what goes wrong says which one it was."""
        try:
            self.run(model, batch)
        except Exception as error:
            few = (
                ": one value per channel; drop_last=True leaves a short last batch out"
                if _TOO_FEW in str(error)
                else ""
            )
            error.add_note(f"calibrate_: this was batch {self.done + 1}; nothing was changed{few}")
            raise

    def words(self) -> Iterator[str]:
        """How much was seen."""
        share = f", and not the {self.steps} that were asked for" if self.steps and self.done < self.steps else ""
        yield f"statistics of {self.done} batch{'' if self.done == 1 else 'es'}{share}"
