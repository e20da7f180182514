"""``nk.fold_``: frozen norms go into the layers beside them in a model that goes on training."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn, optim

from normkit.surgery.folding.fold import copied, fold_copy
from normkit.surgery.folding.planning import Filter, Found, look, plan
from normkit.surgery.operate import operate
from normkit.surgery.regroup import New, Regroup
from normkit.surgery.wrappers import unwrap
from normkit.vocabulary.certificate import Certificate
from normkit.vocabulary.prescription import Prescription


def fold_(
    model: nn.Module,
    example_inputs: Any,
    *,
    filter_fn: Filter | None = None,
    optimizer: optim.Optimizer | None = None,
    dry_run: bool = False,
) -> Certificate:
    """Let the layers beside the norms of a model take them in, in place; training goes on without. See :func:`fold`.

    Only what is the same function in training and in evaluation is folded: batch norms that are frozen
    (:func:`freeze_`), and weight and bias of the other norms where the layers behind them can have them. What the
    network computes stays; how it learns does not, since the gradient of a folded weight is another one.

    Args:
        model: any module; a DistributedDataParallel wrapper is refused.
        example_inputs: as :func:`fold` has them.
        filter_fn: ``(module, name) -> bool``: the modules in whose forward norms may be folded; default all.
        optimizer: parameters of folded norms leave it, new biases join the group of their layer. Momentum stays as it
            is, in the units of the weights before.
        dry_run: change nothing, and return what would be done.

    Returns:
        What was folded, and of every other norm why not. ``undo()`` takes it back as long as nothing was trained since.

    Raises:
        TypeError: a wrapper that cannot be looked through, or a model that cannot be copied.
        ValueError: the model does not take ``example_inputs``.
        RuntimeError: the folded model computes something else; the model is as it was.

    >>> import torch, normkit as nk
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), nk.BatchNorm2d(8), torch.nn.ReLU())
    >>> certificate = nk.freeze_(model, affine=False)
    >>> print(nk.fold_(model, torch.randn(2, 3, 8, 8)).verdict)
    fold_: 1 x BatchNorm2d folded into the layer before it.

    When not to use it: before training is nearly over: the layers lose what the norm did for their learning rate.
    """
    inner = unwrap(model, "fold_")
    if inner is not model:
        raise TypeError(
            "fold_: the model is wrapped in DistributedDataParallel, which holds on to the parameters there are.\n"
            "  fold the model before it is wrapped"
        )
    rehearsal = copied(inner)
    found = _at_rest(inner, look(rehearsal, example_inputs, filter_fn))
    if not dry_run:
        fold_copy(inner, rehearsal, found, example_inputs)  # on copies, with all that can go wrong
    intended = replace(plan(inner, found), operation="fold_")
    if intended.steps and optimizer is not None:
        reason = "it trains what there is"
        intended.add(Prescription("optimizer follows", "", reason, "eval_identical"), Follow(inner, optimizer))
    return operate(intended, example_inputs=example_inputs, dry_run=dry_run)


def _at_rest(model: nn.Module, found: Found) -> Found:
    """Without the norms that normalise by the batch when the model trains."""
    kept = []
    for one, way in found.folds:
        home = model.get_submodule(one.site.home(model))
        if one.site.constants.var is not None and not getattr(home, "frozen", False):
            found.refused[one.site.owner] = "it normalises by the batch in training; normkit.freeze_ it first"
        else:
            kept.append((one, way))
    return replace(found, folds=kept)


@dataclass
class Follow:
    """An optimizer loses the parameters that a fold takes out of a model, and gets those that it puts in. An edit."""

    model: nn.Module
    optimizer: optim.Optimizer
    before: dict[int, nn.Parameter] = field(init=False)
    regroup: Regroup | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.before = {id(parameter): parameter for parameter in self.model.parameters()}

    def apply(self) -> None:
        now = dict(self.model.named_parameters())
        ids = {id(parameter) for parameter in now.values()}
        removed = [parameter for key, parameter in self.before.items() if key not in ids]
        added = [New(name, p, self._beside(name)) for name, p in now.items() if id(p) not in self.before]
        self.regroup = Regroup(self.optimizer, removed, added)
        self.regroup.apply()

    def _beside(self, name: str) -> tuple[nn.Parameter, ...]:
        return tuple(self.model.get_submodule(name.rpartition(".")[0]).parameters(recurse=False))

    def objections(self) -> list[str]:
        return [] if self.regroup is None else self.regroup.objections()

    def revert(self) -> None:
        if self.regroup is not None:
            self.regroup.revert()
