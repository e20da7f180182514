"""Wrappers around a model: looked through where the model inside stays whole, refused with a sentence elsewhere."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def unwrap(model: nn.Module, operation: str) -> nn.Module:
    """The model to operate on.

    Raises:
        TypeError: not a module, or one whose wrapper holds on to what the operation would change.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{operation}: {type(model).__name__} is not a torch.nn.Module.\n  give the model itself")
    for name, module in model.named_modules():
        if reason := _reason_against(module):
            place = name or "the model"
            raise TypeError(f"{operation}: {place} is {reason[0]}; nothing was changed.\n  {reason[1]}")
    while isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return model


def inside(model: nn.Module, operation: str) -> nn.Module:
    """The model inside wrappers that only call it, for an operation that changes values and no structure.

    Raises:
        TypeError: not a module, or one whose code is fixed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{operation}: {type(model).__name__} is not a torch.nn.Module.\n  give the model itself")
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(original := model._modules.get("_orig_mod"), nn.Module):  # torch.compile(model)
            model = original
        else:
            break
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            reason, remedy = _SCRIPTED
            raise TypeError(f"{operation}: {name or 'the model'} is {reason}; nothing was changed.\n  {remedy}")
    return model


_one_at_a_time = threading.Lock()
_eager = 0
"""How many contexts of :func:`eagerly` are open, in all threads: the stance of the compiler is one per process."""
_stance: Any = None


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """While open, compiled code runs as it is written. Contexts nest, and may be open in several threads."""
    global _eager, _stance
    with _one_at_a_time:
        if not _eager:
            _stance = torch.compiler.set_stance("force_eager")
            _stance.__enter__()
        _eager += 1
    try:
        yield
    finally:
        with _one_at_a_time:
            _eager -= 1
            if not _eager:
                _stance.__exit__(None, None, None)


def uncompiled(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """While open, compiled modules in the model run as they are written, so that hooks on their layers are called."""
    if any(module._compiled_call_impl or "_orig_mod" in module._modules for module in model.modules()):
        return eagerly()
    return contextlib.nullcontext()


_SCRIPTED = "a TorchScript module, whose code is fixed", "do it before torch.jit.script or torch.jit.trace"


def _reason_against(module: nn.Module) -> tuple[str, str] | None:
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return _SCRIPTED
    if isinstance(module, nn.DataParallel):
        return (
            "DataParallel, which copies the modules in every step",
            "give model.module, or use DistributedDataParallel",
        )
    if any(base.__module__.startswith("torch._dynamo") for base in kind.__mro__) or module._compiled_call_impl:
        return "compiled already", 'do it before torch.compile; or leave it and use torch.compile(backend="normkit")'
    if any(base.__module__.startswith("torch.distributed.fsdp") for base in kind.__mro__):
        return "sharded by FSDP", "do it before the model is sharded"
    return None
