"""``nk.fold``: a new model whose norms have gone into the layers beside them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normkit.surgery import probe
from normkit.surgery.folding import edits
from normkit.surgery.folding.planning import Filter, Found, look, plan
from normkit.surgery.operate import operate
from normkit.surgery.wrappers import unwrap
from normkit.vocabulary.certificate import Certificate


@overload
def fold(
    model: nn.Module, example_inputs: Any, *, filter_fn: Filter | None = None, dry_run: Literal[False] = False
) -> nn.Module: ...
@overload
def fold(
    model: nn.Module, example_inputs: Any, *, filter_fn: Filter | None = None, dry_run: Literal[True]
) -> Certificate: ...
def fold(
    model: nn.Module, example_inputs: Any, *, filter_fn: Filter | None = None, dry_run: bool = False
) -> nn.Module | Certificate:
    """A new model for evaluation, without the norms that the layers beside them can take in. ``model`` stays as it is.

    In evaluation a batch norm multiplies every channel by ``weight / sqrt(running_var + eps)`` and adds ``bias -
    running_mean * weight / sqrt(running_var + eps)``. A convolution (transposed and grouped ones too) or a linear layer
    right before it does the same with other numbers; so does one right behind it, if it does not pad with zeros. Of
    layer, RMS, group and instance norms weight and bias go into the layers behind them. ``batch_norm(x) + eta * x``
    goes as a whole. The arithmetic is in float64; the type of each parameter stays.

    Args:
        model: any module; a DistributedDataParallel wrapper is looked through. It is copied, twice for a moment.
        example_inputs: a batch: a tensor, a tuple of positional or a dict of keyword arguments. Who reads what is
            taken from one run on it, and not from the order of the children. Two samples or more, of a usual size.
        filter_fn: ``(module, name) -> bool``: the modules in whose forward norms may be folded; default all.
        dry_run: make no model, and return the certificate of what would be done.

    Returns:
        The folded model, in evaluation. ``folded.certificate`` says what was folded, and of every other norm why not.
        Its ``state_dict`` has the keys of the model's, without those of the norms that are gone and with a ``bias``
        where a layer had none. ``requires_grad`` stays; a new bias has that of the norm's.

    Raises:
        TypeError: a wrapper that cannot be looked through, or a model that cannot be copied.
        ValueError: the model does not take ``example_inputs``.
        RuntimeError: the folded model computes something else: on ``example_inputs``, on random inputs of their shape,
            or with other statistics in all norms, under which no mistake can hide. Nothing is returned.

    >>> import torch, normkit as nk
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    >>> folded = nk.fold(model, torch.randn(2, 3, 8, 8))
    >>> print(folded.certificate.verdict)
    fold: 1 x BatchNorm2d folded into the layer before it.
    >>> folded[1]
    Identity()

    When not to use it: for a model that will train again, since a norm without its batch is none; :func:`freeze_` keeps
    it. A flow that depends on the values or the shape of the input is folded as it was on ``example_inputs``.
    """
    inner = unwrap(model, "fold")
    folded = copied(inner)
    found = look(folded, example_inputs, filter_fn)
    if dry_run:
        return plan(folded, found).certificate()
    certificate = fold_copy(inner, folded, found, example_inputs)
    folded.certificate = replace(certificate, taking_back=_nothing_to_take_back)  # type: ignore[assignment]
    return folded


def copied(model: nn.Module) -> nn.Module:
    """A copy in evaluation."""
    try:
        return copy.deepcopy(model).eval()
    except Exception as error:
        raise TypeError(
            f"fold: the model cannot be copied: {error}\n  torch.nn.utils.weight_norm leaves such tensors behind; use "
            "torch.nn.utils.parametrizations.weight_norm, or remove it with torch.nn.utils.remove_weight_norm first"
        ) from error


def fold_copy(model: nn.Module, folded: nn.Module, found: Found, example_inputs: Any) -> Certificate:
    """Fold, and hold the result against the model in three ways; the certificate has the worst of them."""
    intended = plan(folded, found)
    if not intended.steps:
        return operate(intended, example_inputs=example_inputs)
    rehearsal = copied(model)
    _disturb(rehearsal, found)
    disturbed = operate(plan(rehearsal, found), example_inputs=example_inputs)
    at_random = _randomised(example_inputs)
    before = probe.run(folded, at_random, training=False)
    done = operate(intended, example_inputs=example_inputs)
    random = probe.agreement(folded, at_random, before, intended.changes)
    worst = max(*disturbed.agreement, *done.agreement, random, key=lambda row: row.error / row.limit)
    if not worst.error <= worst.limit:
        raise RuntimeError(
            f"fold: on random inputs the outputs moved by {worst.error:.1e} of their greatest value; limit "
            f"{worst.limit:.1e}.\n  leave modules out with filter_fn= to find the one; report it"
        )
    return replace(done, agreement=(worst,))


def _disturb(model: nn.Module, found: Found) -> None:
    """Move what the norms are made of: with the statistics of a new model a wrong fold goes unnoticed."""
    tensors = edits.named(model)
    noise = torch.Generator().manual_seed(0)
    draw = lambda like: torch.randn(like.shape, generator=noise).to(like) * 0.1
    with torch.no_grad():
        for constants in {one.site.constants for one, _ in found.folds}:
            deviation = 1.0 if constants.var is None else 4 * tensors[constants.var].sqrt()
            for name in constants.names():
                tensor = tensors[name]
                if name == constants.var:
                    tensor.mul_((4 * draw(tensor)).exp())
                else:
                    tensor.add_(draw(tensor) * (deviation if name == constants.mean else 1.0))


def _randomised(example_inputs: Any) -> Any:
    """Random numbers with the mean and the deviation of the probe batch; what is no real number stays."""
    noise = torch.Generator().manual_seed(1)

    def random(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.numel() < 2:
            return leaf
        drawn = torch.randn(leaf.shape, generator=noise, dtype=torch.float64)
        std, mean = (value.cpu() for value in torch.std_mean(leaf.double()))
        return (drawn * std + mean).to(leaf)

    return pytree.tree_map(random, example_inputs)


def _nothing_to_take_back() -> None:
    raise RuntimeError("fold: there is nothing to take back: the model that was given is as it was")
