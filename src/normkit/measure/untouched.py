"""A model that is run and left bit for bit as it was."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from normkit.statistics.buffers import RunningStatistics
from normkit.surgery.probe import random_numbers_restored
from normkit.surgery.wrappers import eagerly


def original(model: nn.Module) -> nn.Module:
    """The model that ``torch.compile`` or DistributedDataParallel wraps: its names are those that people know."""
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module) or isinstance(
        inner := getattr(model, "module", None) if isinstance(model, DistributedDataParallel | DataParallel) else None,
        nn.Module,
    ):
        model = inner
    return model


def copied(batch: Any) -> Any:
    """The batch in fresh memory: a model may write into what it is given."""
    return pytree.tree_map(
        lambda leaf: leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf,
        batch,
    )


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Whatever runs inside, the model is afterwards what it was: buffers, modes, attributes, random state.

    Its buffers are exchanged for copies, not copied back: a training step between its forward and its backward pass
    still finds the tensors that it saved, unmodified. Compiled code does not run, so hooks are heard and nothing is
    compiled anew. Statistics that wait for an optimizer go on waiting; inside they move at once.

    Parameters are the model's own: do not write to them, and take gradients with ``torch.autograd.grad``.

    Raises:
        ValueError: the model has parameters without a shape yet.
    """
    lazy = next((name for name, tensor in _tensors(model) if is_lazy(tensor)), None)
    if lazy is not None:
        raise ValueError(
            f"{lazy} has no shape yet, so there is nothing to measure.\n  run the model on one batch first"
        )
    with contextlib.ExitStack() as stack:
        stack.enter_context(random_numbers_restored())
        stack.enter_context(torch.inference_mode(False))
        if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled, and loading the compiler takes seconds
            stack.enter_context(eagerly())
        copies: dict[int, Tensor] = {}  # a buffer that two modules share stays shared
        for module in model.modules():
            stack.callback(_restore, module, dict(vars(module)), dict(module._buffers))
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())
            for value in vars(module).values():
                if isinstance(value, torch.Generator):
                    stack.callback(value.set_state, value.get_state())
            if isinstance(module, RunningStatistics) and module.hold.pending is not None:
                stack.callback(setattr, module.hold, "pending", module.hold.pending)
                module.hold.pending = None
        yield


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _restore(module: nn.Module, attributes: dict[str, Any], buffers: dict[str, Any]) -> None:
    module._buffers.clear()
    module._buffers.update(buffers)
    now = vars(module)
    for name in now.keys() - attributes.keys():
        del now[name]
    for name, value in attributes.items():
        if name not in now or now[name] is not value:
            now[name] = value


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool | None) -> Iterator[None]:
    """In training or evaluation. ``None``: as it is trained, with the modes it has where some part of it trains."""
    modes = [(module, module.training) for module in model.modules()]
    if training is not None or not any(was for _, was in modes):
        for module, _ in modes:  # not model.train(): some models merge weights in it
            module.training = training is not False
    try:
        yield
    finally:
        for module, was in modes:
            module.training = was
