"""How the forwards of a model are called: tensors here, ``None`` or a number there."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import Tensor, nn

from normkit.surgery import probe

Given = dict[nn.Module, dict[str, Any]]


def calls(model: nn.Module, example_inputs: Any) -> Given:
    """By module, what each parameter of its forward got in the first call of one run in evaluation mode.

    A tensor is recorded as ``torch.Tensor``, everything else as itself. A module that was not called is missing.
    """
    seen: Given = {}

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if module not in seen:
            bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
            given = list(bound.arguments.items())[1:]
            seen[module] = {name: Tensor if isinstance(value, Tensor) else value for name, value in given}

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in model.modules()]
    try:
        probe.run(model, example_inputs, training=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def read_by_others(model: nn.Module, example_inputs: Any) -> dict[nn.Module, str]:
    """Modules whose parameters or buffers other code than their own reads in a run, and the class of who does."""
    found: dict[nn.Module, str] = {}
    below = set(model.modules())

    def read(module: nn.Module, name: str) -> Any:
        value = original(module, name)
        if isinstance(value, Tensor) and module in below:
            reader = sys._getframe(1).f_locals.get("self")
            if isinstance(reader, nn.Module) and reader is not module:
                found.setdefault(module, type(reader).__name__)
        return value

    original = nn.Module.__getattr__
    nn.Module.__getattr__ = read  # type: ignore[method-assign]
    try:
        probe.run(model, example_inputs, training=False)
    finally:
        nn.Module.__getattr__ = original  # type: ignore[method-assign]
    return found
