"""How a model is run on a batch, and where the target of its loss is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normkit.surgery import batches

Call = batches.Call
Loss = Callable[[Any, Any], Tensor]
Run = Callable[[nn.Module, Any], tuple[Any, Tensor | None]]
"""The outputs and, where there is one, the loss of a model on a batch."""


def runner(loss_fn: Loss | None, call: Call | None) -> Run:
    """``call(model, batch)``, then ``loss_fn(output, target)``."""
    call = call or batches.call

    def run(model: nn.Module, batch: Any) -> tuple[Any, Tensor | None]:
        output = call(model, batch)
        return output, None if loss_fn is None else _scalar(loss_fn(output, _beside(output, target_of(batch))))

    return run


def target_of(batch: Any) -> Any:
    """What the loss is given beside the output."""
    if isinstance(batch, tuple | list):
        return batch[1] if len(batch) == 2 else tuple(batch[1:])
    return batch


def _beside(output: Any, target: Any) -> Any:
    """The target where the output is: loaders give both on the CPU, and the model's input went to the model."""
    device = next((leaf.device for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)), None)
    if device is None:
        return target
    return pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, target)


def _scalar(loss: Any) -> Tensor:
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss.reshape(())
    got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
    raise ValueError(
        f"loss_fn returns {got}, and a loss is one number.\n"
        '  reduce it, for example with torch.nn.functional.cross_entropy(output, target, reduction="mean")'
    )
