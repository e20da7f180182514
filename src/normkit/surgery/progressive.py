"""``nk.progressive_`` and ``nk.settle_``: layer norms on their way to RepBN while a model trains, and its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn, optim
from torch.nn.utils import parametrize

from normkit.blocks.rep_batch_norm import ProgressiveRepBatchNorm
from normkit.norm import Norm
from normkit.norms.layer_norm import LayerNorm
from normkit.norms.rms_norm import RMSNorm
from normkit.surgery import recast
from normkit.surgery.become import Become
from normkit.surgery.operate import Plan, operate
from normkit.surgery.regroup import follow
from normkit.surgery.target import carry
from normkit.surgery.wrappers import unwrap
from normkit.vocabulary.certificate import Certificate
from normkit.vocabulary.prescription import Prescription

Filter = Callable[[nn.Module, str], bool]
_KINDS = (nn.LayerNorm, nn.RMSNorm)


def progressive_(
    model: nn.Module,
    steps: int,
    warmup: int = 0,
    *,
    filter_fn: Filter | None = None,
    example_inputs: Any = None,
    optimizer: optim.Optimizer | None = None,
    dry_run: bool = False,
) -> Certificate:
    """Let the layer and RMS norms of a model become batch norms (RepBN) while it trains. In place.

    Each becomes a :class:`normkit.blocks.ProgressiveRepBatchNorm` that still computes the norm that stood there, with
    the same parameters: nothing moves at this moment. With the batches of training its share falls to 0.

    Args:
        model: any module; norms of the last axis, torch's or normkit's.
        steps: training batches in which the share falls from 1 to 0.
        warmup: batches before, in which running statistics settle.
        filter_fn: ``(module, name) -> bool``: which layers; default all.
        example_inputs: the model runs on it before and after, and the greatest error in both modes is certified.
        optimizer: the new parameters join the group of their layer; the state of all others stays.
        dry_run: change nothing, and return what would be done.

    Returns:
        What was changed, skipped and refused, with reasons. ``undo()`` takes it back.

    Raises:
        ValueError: fewer than 1 step.
        TypeError: a wrapper that holds on to the parameters.

    >>> import torch, normkit as nk
    >>> model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 4))
    >>> print(nk.progressive_(model, steps=2).verdict)
    progressive_: 1 x LayerNorm becomes ProgressiveRepBatchNorm.
    >>> for _ in range(2):
    ...     y = model(torch.randn(16, 5, 8))
    >>> print(nk.settle_(model).verdict)
    settle_: 1 x ProgressiveRepBatchNorm becomes RepBatchNorm.

    When not to use it: where inference need not be faster; the model ends with batch norms, which need batches of many
    tokens. Behind the schedule of a training run: ``nk.strategies.attach(..., "progressive@0%-60%")``.

    Source: Guo, Chen, Tang & Wang 2024, arXiv:2405.11582.
    """
    intended = plan(model, steps, warmup, filter_fn=filter_fn, optimizer=optimizer)
    return operate(intended, example_inputs=example_inputs, dry_run=dry_run)


def settle_(
    model: nn.Module,
    *,
    early: bool = False,
    filter_fn: Filter | None = None,
    example_inputs: Any = None,
    optimizer: optim.Optimizer | None = None,
    dry_run: bool = False,
) -> Certificate:
    """Take the layer norms out that :func:`progressive_` has led to a share of 0; RepBN stays, and folds. In place.

    Args:
        model: any module.
        early: also where the layer norm still has a share, which is lost.
        filter_fn: ``(module, name) -> bool``: which layers; default all.
        example_inputs: the model runs on it before and after.
        optimizer: the parameters of the layer norms leave it.
        dry_run: change nothing, and return what would be done.

    Returns:
        What was changed, and what was refused because it still has a share. ``undo()`` takes it back.

    Raises:
        TypeError: a wrapper that holds on to the parameters.

    >>> import normkit as nk
    >>> print(nk.settle_(nk.blocks.ProgressiveRepBatchNorm(8, steps=4)).verdict)
    settle_: nothing was changed; 1 refused.
    """
    intended = settle_plan(model, early=early, filter_fn=filter_fn, optimizer=optimizer)
    return operate(intended, example_inputs=example_inputs, dry_run=dry_run)


def plan(
    model: nn.Module,
    steps: int,
    warmup: int = 0,
    *,
    filter_fn: Filter | None = None,
    optimizer: optim.Optimizer | None = None,
) -> Plan:
    """What :func:`progressive_` would do. Nothing is changed."""
    intended = Plan("progressive_", _whole(model, "progressive_"))
    inside = {part for module in intended.model.modules() if _on_its_way(module) for part in _below(module)}
    owners = {child: module for module in intended.model.modules() for child in module.children()}
    for name, module in intended.model.named_modules():
        if module in inside or not (_on_its_way(module) or isinstance(module, _KINDS)):
            continue
        if _on_its_way(module):
            intended.skip(name, "it is on its way already")
        elif filter_fn is not None and not filter_fn(module, name):
            intended.skip(name, "filter_fn left it out")
        elif reasons := _reasons_against(module, owners.get(module)):
            intended.refuse(name, "; ".join(reasons))
        else:
            action = f"{type(module).__name__} becomes ProgressiveRepBatchNorm"
            prescription = Prescription(action, name, "it is to end as a batch norm that folds", "identical")
            intended.add(prescription, Become(module, _beginning(module, steps, warmup, intended.model)))
    return _completed(intended, optimizer)


def settle_plan(
    model: nn.Module,
    *,
    early: bool = False,
    filter_fn: Filter | None = None,
    optimizer: optim.Optimizer | None = None,
) -> Plan:
    """What :func:`settle_` would do. Nothing is changed."""
    intended = Plan("settle_", _whole(model, "settle_"))
    for name, module in intended.model.named_modules():
        if not isinstance(module, ProgressiveRepBatchNorm):
            continue
        share = float(module.share)
        if filter_fn is not None and not filter_fn(module, name):
            intended.skip(name, "filter_fn left it out")
        elif share and not early:
            intended.refuse(name, f"its layer norm still has a share of {share:.3g}; train on first, or early=True")
        else:
            prescription = Prescription(
                "ProgressiveRepBatchNorm becomes RepBatchNorm",
                name,
                f"its layer norm has a share of {share:.3g}",
                "retrain" if share else "identical",
            )
            intended.add(prescription, Become(module, module.rep.train(module.training)))
    return _completed(intended, optimizer)


def _whole(model: nn.Module, operation: str) -> nn.Module:
    inner = unwrap(model, operation)
    if inner is not model:
        raise TypeError(
            f"{operation}: the model is wrapped in DistributedDataParallel, which holds on to the parameters there "
            f"are.\n  call {operation} before the model is wrapped"
        )
    return inner


def _on_its_way(module: nn.Module) -> bool:
    return isinstance(module, ProgressiveRepBatchNorm)


def _below(module: nn.Module) -> Iterator[nn.Module]:
    return (part for part in module.modules() if part is not module)


def _reasons_against(layer: Any, owner: nn.Module | None) -> list[str]:
    if not isinstance(layer, Norm) and (reasons := recast.reasons_against(layer)):
        return reasons
    if parametrize.is_parametrized(layer):
        return ["it has parametrizations; remove them with torch.nn.utils.parametrize.remove_parametrizations first"]
    if len(layer.normalized_shape) > 1:
        return [f"it normalises {len(layer.normalized_shape)} axes, and every token has to be a row of channels"]
    if getattr(layer, "channels_first", False):
        return ["its channels are on axis 1, and every token has to be a row of channels"]
    if getattr(layer, "activation", None) is not None:
        return [f"it activates by {layer.activation}; put the activation behind the layer"]
    if isinstance(owner, nn.TransformerEncoderLayer) and type(owner).forward is nn.TransformerEncoderLayer.forward:
        return ["torch's encoder layer reads its weights in evaluation and computes a layer norm itself; take nk's"]
    return []


def _beginning(layer: Any, steps: int, warmup: int, model: nn.Module) -> ProgressiveRepBatchNorm:
    """What the layer becomes: itself, with its own parameters, beside a batch norm that begins with their values."""
    (channels,) = layer.normalized_shape
    like = next((p for p in (*layer.parameters(), *model.parameters())), torch.empty(0))
    where: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    fresh = ProgressiveRepBatchNorm(channels, steps, warmup, layer.eps or 1e-5, **where)
    with torch.device("meta"):
        if isinstance(layer, nn.RMSNorm):
            fresh.layer = RMSNorm(channels, layer.eps, layer.elementwise_affine)
        else:
            fresh.layer = LayerNorm(channels, layer.eps, layer.elementwise_affine, layer.bias is not None)
    fresh.layer._parameters.update(layer._parameters)  # the same objects: an optimizer goes on with them
    carry(layer, fresh.rep.norm)
    return fresh.train(layer.training)


def _completed(intended: Plan, optimizer: optim.Optimizer | None) -> Plan:
    edits = {step.edit.layer: step.edit for step in intended.steps if isinstance(step.edit, Become)}
    follow(intended, optimizer)
    for name, module in intended.model.named_modules(remove_duplicate=False):
        if module in edits:
            intended.changes |= edits[module].changes(name)
    return intended
