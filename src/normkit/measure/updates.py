"""Updates: how far one step of an optimizer moves the weights, and how often it has let running statistics move."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn, optim

from normkit.measure.sites import wide
from normkit.vocabulary.quantity import Quantity
from normkit.vocabulary.reading import Reading

EFFECTIVE, ALONG = "effective_learning_rate", "gradient_along_weight"
QUANTITIES = (
    Quantity(
        "update_to_weight",
        "run",
        "",
        "||w' - w|| / ||w||, w': the weight after the step",
        per="parameter",
        means="How far one step moves a weight, beside its length; 0.001 is usual.",
    ),
    Quantity(
        "angle_per_step",
        "run",
        "radians",
        "angle between w and w'; what a step changes of a weight whose scale does not matter",
        "Wan et al. 2021, arXiv:2006.08419",
        per="parameter",
        means="By which angle one step turns a weight.",
    ),
    Quantity("learning_rate", "run", "", "the learning rate of the parameter's group", per="parameter"),
    Quantity("loss", "run", "loss", "the loss of the step", per="model"),
    Quantity(
        "statistics_moves",
        "run",
        "moves per step",
        "how often num_batches_tracked has counted per step of the optimizer",
        means="Running statistics should move once per forward pass.",
    ),
    Quantity(
        EFFECTIVE,
        "gradients",
        "",
        "learning rate / ||w||², of weights right before a norm whose gradient_along_weight < 1e-3: "
        "their scale does not matter; needs the optimizer",
        "van Laarhoven 2017, arXiv:1706.05350",
        per="parameter",
        means="How fast the direction of a weight turns, where its scale does not matter.",
    ),
)


def read(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], wanted: frozenset[str]
) -> Iterator[tuple[str, str, Tensor]]:
    """What one step did to each weight. ``before``: copies of the weights, made before the step."""
    with torch.no_grad():
        for name, old in before.items():
            if not old.numel() or not old.is_floating_point():
                continue
            w, new = wide(old), wide(after[name])
            found = {"update_to_weight": (new - w).norm() / w.norm(), "angle_per_step": angle(w, new)}
            yield from ((quantity, name, value) for quantity, value in found.items() if quantity in wanted)


def angle(a: Tensor, b: Tensor) -> Tensor:
    """Between two tensors as vectors. From differences: the cosine of a small angle is 1 in float32."""
    a, b = a / a.norm(), b / b.norm()
    return 2 * torch.atan2((a - b).norm(), (a + b).norm())


def learning_rates(model: nn.Module, optimizer: optim.Optimizer) -> dict[str, Any]:
    """By name of the parameter."""
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    return {name: rates[id(p)] for name, p in model.named_parameters() if id(p) in rates}


SCALE_FREE = 1e-3
"""Greatest cosine of gradient and weight that rounding and eps leave of 0.

Right before a norm, and orthogonal: what a layer hands to a norm may go past it as well.
"""


def effective(
    model: nn.Module, rates: Mapping[str, Any], before_norms: Mapping[str, str]
) -> Iterator[tuple[str, str, Tensor]]:
    """Learning rates over squared lengths, of the weights in :attr:`Collection.before_norms`."""
    for name, parameter in model.named_parameters():
        if name in before_norms and name in rates:
            yield EFFECTIVE, name, rates[name] / wide(parameter).square().sum()


def only_scale_free(readings: Sequence[Reading]) -> list[Reading]:
    """Without effective learning rates of weights whose gradient is not orthogonal to them, or not known."""
    free = {r.module for r in readings if r.quantity == ALONG and isinstance(r.value, float) and r.value < SCALE_FREE}
    return [reading for reading in readings if reading.quantity != EFFECTIVE or reading.module in free]


def moves(before: Mapping[str, Tensor], model: nn.Module, steps: int) -> Iterator[tuple[str, str, Tensor]]:
    """How often running statistics have moved since :func:`counts` gave ``before``, per step."""
    for name, now in counts(model).items():
        if name in before:
            yield "statistics_moves", name, (now - before[name]) / steps


def counts(model: nn.Module) -> dict[str, Tensor]:
    """Copies of ``num_batches_tracked``, by module."""
    counters = ((name, getattr(module, "num_batches_tracked", None)) for name, module in model.named_modules())
    return {name: counter.detach().double() for name, counter in counters if isinstance(counter, Tensor)}
