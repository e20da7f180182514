"""The last batch of a training loop: as surgery takes it, and what the model makes of it before and after a switch."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normkit.surgery import probe

Batch = tuple[tuple, dict[str, Any]]
"""The arguments of a call of the model."""
Outputs = dict[bool, list[Tensor]]
"""In training (True) and in evaluation."""
MOVED = {"moved_in_training": True, "moved_in_evaluation": False}


def example_inputs(model: nn.Module, batch: Batch) -> tuple | dict[str, Any]:
    """The arguments of a call, as surgery takes them: positional ones, or all by name."""
    args, kwargs = batch
    return args if not kwargs else dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)


def few(example: Any) -> Any:
    """Two samples of it."""
    count = samples(example)
    cut = lambda leaf: leaf[:2].detach().clone() if isinstance(leaf, Tensor) and leaf.shape[:1] == (count,) else leaf
    return pytree.tree_map(cut, example)


def samples(batch: Any) -> int:
    """How many there are: the first size of the first tensor."""
    sizes = [leaf.shape[0] for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()]
    return sizes[0] if sizes else 0


def outputs(model: nn.Module, batch: Batch | None) -> Outputs:
    """Of a batch, in training and in evaluation; the model and random numbers are put back."""
    if batch is None:
        return {}
    found = {}
    for training in (True, False):
        with probe.restored(model), torch.no_grad():
            model.train(training)
            output = model(*batch[0], **batch[1])
        leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        found[training] = [leaf for leaf in leaves if leaf.is_floating_point()]
    return found


def moved(before: Outputs, after: Outputs) -> dict[str, float | None]:
    """Root mean square change of the outputs in each mode, in standard deviations of those before."""
    return {name: _change(before[training], after[training]) if before else None for name, training in MOVED.items()}


def _change(before: list[Tensor], after: list[Tensor]) -> float:
    then, now = (torch.cat([t.double().flatten() for t in side] or [torch.zeros(1)]) for side in (before, after))
    return float((now - then).square().mean().sqrt() / then.std(correction=0).clamp_min(1e-30))
