"""Evaluations: the same batch in training, by running statistics, and by its own statistics with all else at rest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normkit.measure.observer import Seen
from normkit.measure.running import Run
from normkit.measure.sites import norm_site, wide
from normkit.measure.untouched import copied, in_mode, untouched
from normkit.vocabulary.quantity import Quantity

_GAP = "||{} - {}|| / ||{}||, y: all outputs of the model"

QUANTITIES = (
    Quantity(
        "train_eval_gap",
        "batch",
        "relative",
        _GAP.format("y in training", "y in evaluation", "y in evaluation"),
        per="model",
    ),
    Quantity(
        "batch_statistics_gap",
        "batch",
        "relative",
        _GAP.format("y by batch statistics", "y by running statistics", "y by running statistics")
        + "; all else in evaluation",
        per="model",
    ),
    Quantity("loss_training", "batch", "loss", "the loss in training", per="model"),
    Quantity("loss_running", "batch", "loss", "the loss in evaluation, by running statistics", per="model"),
    Quantity(
        "loss_batch_statistics", "batch", "loss", "the loss by batch statistics, all else in evaluation", per="model"
    ),
    Quantity(
        "variance_shift",
        "batch",
        "nats",
        "mean over channels of log(variance of a batch norm's input in training / with dropout and all else in "
        "evaluation, by batch statistics)",
        "Li et al. 2019, arXiv:1801.05134",
    ),
)
NAMES = frozenset(quantity.name for quantity in QUANTITIES)


def read(model: nn.Module, batch: Any, run: Run, wanted: frozenset[str]) -> Iterator[tuple[str, str, Tensor]]:
    """Three forward passes, each from the same random state."""
    if not wanted & NAMES:
        return
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    training = _pass(model, batch, run, norms)
    running = _pass(model, batch, run, norms, training=False)
    found = {"train_eval_gap": distance(training.outputs, running.outputs)}
    losses = {"loss_training": training.loss, "loss_running": running.loss}
    if norms:
        at_rest = _pass(model, batch, run, norms, training=False, by_batch=True)
        found["batch_statistics_gap"] = distance(at_rest.outputs, running.outputs)
        losses["loss_batch_statistics"] = at_rest.loss
        both = [name for name in training.variances if name in at_rest.variances]
        for name in both if "variance_shift" in wanted else ():
            shift = (training.variances[name] / at_rest.variances[name]).log()
            yield "variance_shift", name, torch.where(shift.isfinite(), shift, 0).mean()
    found |= {name: loss.detach() for name, loss in losses.items() if loss is not None}
    yield from ((quantity, "", value) for quantity, value in found.items() if quantity in wanted)


@dataclass
class _Pass:
    outputs: list[Tensor] = field(default_factory=list)
    loss: Tensor | None = None
    variances: dict[str, Tensor] = field(default_factory=dict)
    """Of what comes into each batch norm, by channel."""


def _pass(
    model: nn.Module,
    batch: Any,
    run: Run,
    norms: dict[str, Any],
    *,
    training: bool | None = None,
    by_batch: bool = False,
) -> _Pass:
    found = _Pass()
    with contextlib.ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.enter_context(in_mode(model, training))
        stack.enter_context(torch.no_grad())
        for name, module in norms.items():
            module.training = module.training or by_batch
            stack.callback(module.register_forward_pre_hook(_note(found, name), with_kwargs=True).remove)
        output, found.loss = run(model, copied(batch))
    leaves = [leaf for leaf in pytree.tree_leaves(_plain(output)) if isinstance(leaf, Tensor)]
    found.outputs = [leaf.detach() for leaf in leaves if leaf.is_floating_point()]
    return found


def _note(found: _Pass, name: str) -> Any:
    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x, site = Seen(module, args, kwargs).input, norm_site(module)
        laid = None if x is None or site is None else site.lay(wide(x), kwargs)
        if laid is not None:
            found.variances[name] = laid.mean_and_variance()[1]

    return note


def _plain(output: Any) -> Any:
    """Outputs of transformers are dicts with attributes, which torch's tree does not always know."""
    return dict(output) if isinstance(output, dict) else output


def distance(ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """||ours - theirs|| / ||theirs|| over all tensors; NaN where the modes give different outputs."""
    if not theirs or [t.shape for t in ours] != [t.shape for t in theirs]:
        return torch.tensor(float("nan"))
    place = theirs[0].device
    square = lambda tensors: torch.stack([t.double().square().sum().to(place) for t in tensors]).sum()
    return (square([a.double() - b.double() for a, b in zip(ours, theirs, strict=True)]) / square(theirs)).sqrt()
