"""Wrappers around a model: looked through where the model inside stays whole, refused with a sentence elsewhere."""

from __future__ import annotations

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


def _reason_against(module: nn.Module) -> tuple[str, str] | None:
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "a TorchScript module, whose code is fixed", "do it before torch.jit.script or torch.jit.trace"
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
