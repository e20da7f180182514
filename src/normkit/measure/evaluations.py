"""Evaluations: the same batch in training, by running statistics, and by its own statistics with all else at rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normkit.measure.running import Run
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
        means="How far the outputs in training are from those in evaluation, on the same batch.",
    ),
    Quantity(
        "batch_statistics_gap",
        "batch",
        "relative",
        _GAP.format("y by batch statistics", "y by running statistics", "y by running statistics")
        + "; all else in evaluation",
        per="model",
        means="How far the outputs by batch statistics are from those by running statistics.",
    ),
    Quantity("loss_training", "batch", "loss", "the loss in training", per="model"),
    Quantity("loss_running", "batch", "loss", "the loss in evaluation, by running statistics", per="model"),
    Quantity(
        "loss_batch_statistics", "batch", "loss", "the loss by batch statistics, all else in evaluation", per="model"
    ),
)
NAMES = frozenset(quantity.name for quantity in QUANTITIES)


def read(model: nn.Module, batch: Any, run: Run, wanted: frozenset[str]) -> Iterator[tuple[str, str, Tensor]]:
    """Three forward passes, each from the same random state."""
    if not wanted & NAMES:
        return
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    losses: dict[str, Tensor | None] = {}
    training, losses["loss_training"] = _pass(model, batch, run)
    running, losses["loss_running"] = _pass(model, batch, run, training=False)
    found = {"train_eval_gap": distance(training, running)}
    if norms:
        at_rest, losses["loss_batch_statistics"] = _pass(model, batch, run, training=False, by_batch=norms)
        found["batch_statistics_gap"] = distance(at_rest, running)
    found |= {name: loss.detach() for name, loss in losses.items() if loss is not None}
    yield from ((quantity, "", value) for quantity, value in found.items() if quantity in wanted)


def _pass(
    model: nn.Module, batch: Any, run: Run, *, training: bool | None = None, by_batch: Sequence[nn.Module] = ()
) -> tuple[list[Tensor], Tensor | None]:
    with untouched(model), in_mode(model, training), torch.no_grad():
        for module in by_batch:
            module.training = True
        output, loss = run(model, copied(batch))
    leaves = [leaf for leaf in pytree.tree_leaves(_plain(output)) if isinstance(leaf, Tensor)]
    return [leaf.detach() for leaf in leaves if leaf.is_floating_point()], loss


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
