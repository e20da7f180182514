"""A model on a probe batch, before and after: the outputs and the buffers, and how far they moved."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from normkit.surgery import preserve
from normkit.vocabulary.certificate import Agreement


@dataclass(frozen=True)
class Outcome:
    """What one forward left: outputs in order, buffers by name."""

    training: bool
    tensors: dict[str, Tensor]


def run(model: nn.Module, example_inputs: Any, *, training: bool) -> Outcome:
    """The outputs of the model in one mode; the model, and the random state, are put back.

    Raises:
        ValueError: the model does not take the probe batch in this mode.
    """
    args, kwargs = arguments(example_inputs)
    with restored(model), torch.set_grad_enabled(training), whole_products():
        model.train(training)
        try:
            output = model(*args, **kwargs)
        except Exception as error:
            mode = "training" if training else "evaluation"
            raise ValueError(
                f"example_inputs: the model raises {type(error).__name__} on them in {mode}: {error}\n"
                "  give a batch that it takes in training and in evaluation: a tensor, a tuple of the positional "
                "arguments, or a dict of keyword arguments"
            ) from error
        leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        tensors = {f"output {place}": leaf.detach().clone() for place, leaf in enumerate(leaves)}
        tensors |= {preserve.buffer(name): held.detach().clone() for name, held in model.named_buffers()}
        return Outcome(training, tensors)


def agreement(model: nn.Module, example_inputs: Any, before: Outcome, meant: Collection[str] = ()) -> Agreement:
    """How far the model's outputs are from those of before; ``meant``: buffers that were meant to change."""
    after = run(model, example_inputs, training=before.training)
    kept = {name: then for name, then in before.tensors.items() if name not in meant}
    error = max((_distance(then, after.tensors.get(name)) for name, then in kept.items()), default=0.0)
    return Agreement(before.training, error, _limit(model, example_inputs, before))


def arguments(example_inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """Positional and keyword arguments of a call."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)), {}


def _distance(then: Tensor, now: Tensor | None) -> float:
    """Greatest difference, divided by the greatest value; infinite where shapes, types or non-finite places differ."""
    if now is None or then.shape != now.shape or then.dtype != now.dtype:
        return float("inf")
    if not then.numel():
        return 0.0
    if not (then.is_floating_point() or then.is_complex()):
        return 0.0 if torch.equal(then, now) else float("inf")
    finite = then.isfinite()
    if not torch.equal(finite, now.isfinite()):
        return float("inf")
    wide = torch.promote_types(then.dtype, torch.float64)
    a, b = then[finite].to(wide), now[finite].to(wide)
    if not a.numel():
        return 0.0
    return float((a - b).abs().max() / a.abs().max().clamp_min(torch.finfo(torch.float32).tiny))


def _limit(model: nn.Module, example_inputs: Any, before: Outcome) -> float:
    """The square root of the unit roundoff of the coarsest type in play: half of the digits.

    A mistake costs more; the rounding of one fused instead of two separate steps, carried through the depth of a
    network that can be trained, costs less.
    """
    tensors = [*model.parameters(), *pytree.tree_leaves(arguments(example_inputs)), *before.tensors.values()]
    types = {tensor.dtype for tensor in tensors if isinstance(tensor, Tensor) and tensor.is_floating_point()}
    devices = {tensor.device.type for tensor in tensors if isinstance(tensor, Tensor)}
    types |= {torch.get_autocast_dtype(device) for device in devices if torch.is_autocast_enabled(device)}
    return max((torch.finfo(kind).eps for kind in types), default=torch.finfo(torch.float32).eps) ** 0.5


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Modes, buffers (objects and values) and the random state as they were."""
    modules = list(model.modules())
    modes = [module.training for module in modules]
    copied = lambda buffer: None if buffer is None or is_lazy(buffer) else buffer.detach().clone()
    buffers = [{name: (held, copied(held)) for name, held in module._buffers.items()} for module in modules]
    try:
        with random_numbers_restored():
            yield
    finally:
        for module, training, kept in zip(modules, modes, buffers, strict=True):
            module.training = training
            for name, (held, value) in kept.items():
                module._buffers[name] = held
                if held is not None and value is not None:
                    with torch.no_grad():
                        held.copy_(value)


@contextlib.contextmanager
def whole_products() -> Iterator[None]:
    """float32 is multiplied as float32: on a GPU, convolutions round it to TF32 unless they are told not to, and a
    weight that was scaled rounds to other values than the one it was."""
    cuda: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    matmul, convolutions = _older(torch.get_float32_matmul_precision), _older(lambda: cudnn.allow_tf32)
    newer = cuda.fp32_precision, cudnn.conv.fp32_precision
    if matmul is None:
        cuda.fp32_precision = "ieee"
    else:
        torch.set_float32_matmul_precision("highest")
    if convolutions is None:
        cudnn.conv.fp32_precision = "ieee"
    else:
        torch._C._set_cudnn_allow_tf32(False)  # the attribute is closed once torch.testing's own helpers are loaded
    try:
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if convolutions is not None:
            torch._C._set_cudnn_allow_tf32(convolutions)
        cuda.fp32_precision, cudnn.conv.fp32_precision = newer


def _older(read: Callable[[], Any]) -> Any:
    """A setting of torch's by its older name; ``None``: the newer ones were used in a way that it cannot tell."""
    try:
        return read()
    except RuntimeError:
        return None


@contextlib.contextmanager
def random_numbers_restored() -> Iterator[None]:
    """torch's, Python's and NumPy's: a model that draws any of them draws the same ones in its next run."""
    numpy: Any = sys.modules.get("numpy.random")
    before = random.getstate(), None if numpy is None else numpy.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
            yield
    finally:
        random.setstate(before[0])
        if numpy is not None:
            numpy.set_state(before[1])
