"""Theory probes: what the papers say that normalization does, measured. They take passes of their own.

Each runs the model in training on one batch, moves its weights along the gradient and puts them back, bit for bit.
Not between a forward and a backward pass: the values of the weights change meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normkit.measure import gradients
from normkit.measure.collect import packed
from normkit.measure.point import Point, floats, length_of, outputs
from normkit.measure.running import Call, Loss, runner
from normkit.measure.sites import wide
from normkit.measure.untouched import copied, in_mode, original, untouched
from normkit.vocabulary.reading import Reading

LENGTHS = tuple(0.5 * 8 ** (place / 7) for place in range(8))
"""Of the steps along the gradient, in learning rates: 1/2 to 4, evenly spaced in the logarithm."""


def internal_covariate_shift(
    model: nn.Module, batch: Any, *, loss_fn: Loss, lr: float, call: Call | None = None
) -> list[Reading]:
    """How much the update of the layers before it changes the gradient of each layer, on the same batch.

    A layer is a module with parameters of its own, in the order of the model. One forward and backward pass per layer.

    Args:
        model: a model, which is left as it was.
        batch: as :func:`normkit.measure.measure` takes it.
        loss_fn: as there.
        lr: length of the gradient step that the earlier layers take.
        call: as there.

    Returns:
        ``internal_covariate_shift`` and ``gradient_cosine`` of every layer but the first.

    When not to use it: as a measure of how well training goes; networks with batch norm often have more of it.

    Source: Santurkar et al. 2018, arXiv:1805.11604, definition 2.1.
    """
    point = Point(model, batch, loss_fn, call)
    found: list[tuple[str, str, Tensor]] = []
    earlier: list[nn.Parameter] = []
    for name, own in point.layers():
        if earlier:
            with point.stepped(earlier, lr):
                now = point.gradients_at(own)
            before = torch.cat([point.gradient[p].flatten() for p in own])
            after = torch.cat([now[p].flatten() for p in own])
            found.append(("internal_covariate_shift", name, (before - after).norm()))
            found.append(("gradient_cosine", name, torch.cosine_similarity(before, after, 0)))
        earlier += own
    return packed(found)


def landscape(
    model: nn.Module,
    batch: Any,
    *,
    loss_fn: Loss,
    lr: float,
    lengths: Sequence[float] = LENGTHS,
    call: Call | None = None,
) -> list[Reading]:
    """How far the loss and its gradient change along the gradient: how far a step can be trusted.

    One forward and backward pass per length.

    Args:
        model: a model, which is left as it was.
        batch: as :func:`normkit.measure.measure` takes it.
        loss_fn: as there.
        lr: a learning rate; the steps are ``lr * length * gradient``.
        lengths: of the steps.
        call: as there.

    Returns:
        ``loss_range``, ``relative_loss``, ``gradient_predictiveness`` and ``effective_smoothness`` of the model.

    Source: Santurkar et al. 2018, arXiv:1805.11604, section 3; Bjorck et al. 2018, arXiv:1806.02375.
    """
    point = Point(model, batch, loss_fn, call)
    size = length_of(point.gradient.values())
    losses, changes, slopes = [], [], []
    for length in lengths:
        with point.stepped(point.trained, lr * length):
            loss, now = point.evaluate(point.trained)
        change = length_of(now[p] - point.gradient[p] for p in point.trained)
        losses.append(loss)
        changes.append(change)
        slopes.append(change / (lr * length * size))
    along, change = torch.stack(losses), torch.stack(changes)
    found = {
        "loss_range": along.max() - along.min(),
        "relative_loss": along.max() / point.loss,
        "gradient_predictiveness": change.max(),
        "effective_smoothness": torch.stack(slopes).max(),
    }
    return packed((quantity, "", value) for quantity, value in found.items())


def activation_drift(
    model: nn.Module, batch: Any, *, loss_fn: Loss, lr: float, call: Call | None = None
) -> list[Reading]:
    """How far one gradient step of all weights moves what comes out of each activation, in its own deviations.

    Args:
        model: a model, which is left as it was.
        batch: as :func:`normkit.measure.measure` takes it.
        loss_fn: as there.
        lr: length of the step.
        call: as there.

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167, figure 1, who show the percentiles of one unit.
    """
    point = Point(model, batch, loss_fn, call)
    before = point.units()
    with point.stepped(point.trained, lr):
        after = point.units()
    found = []
    for name, units in before.items():
        std, mean = torch.std_mean(units, 0, correction=0)
        moved = (after[name].mean(0) - mean).abs() / std
        found.append(("activation_drift", name, torch.where(std > 0, moved, 0).sum() / (std > 0).sum()))
    return packed(found)


def explosion_rate(
    model: nn.Module, batch: Any, *, loss_fn: Loss | None = None, call: Call | None = None, seed: int = 0
) -> list[Reading]:
    """By which factor the squared gradient grows per activation on its way to the input.

    Args:
        model: a model, which is left as it was.
        batch: as :func:`normkit.measure.measure` takes it.
        loss_fn: as there; ``None``: a normal random gradient at every output.
        call: as there.
        seed: of that random gradient.

    Returns:
        ``output_gradient_norm`` of every activation in the order of their calls, and ``explosion_rate`` of the model.

    Raises:
        ValueError: fewer than two activations have a gradient.

    Source: Yang et al. 2019, arXiv:1902.08129.
    """
    model = original(model)
    draw = torch.Generator().manual_seed(seed)
    with untouched(model), in_mode(model, None), torch.enable_grad(), outputs(model) as found:
        output, loss = runner(loss_fn, call)(model, copied(batch))
        if loss is None:
            loss = torch.stack([(y * torch.randn(y.shape, generator=draw).to(y)).sum() for y in floats(output)]).sum()
        reached = {name: y for name, y in found.items() if y.requires_grad}
        taken = torch.autograd.grad(loss, list(reached.values()), allow_unused=True) if reached else ()
    norms = {name: wide(g).norm() for name, g in zip(reached, taken, strict=True) if g is not None}
    if len(norms) < 2:
        raise ValueError(
            f"explosion_rate: {len(norms)} activations of {type(model).__name__} have a gradient; a rate takes 2.\n"
            "  only activations that are modules are seen, and norms of normkit with activation="
        )
    rate = gradients.growth(list(norms.values()))["gradient_growth"]
    return packed(
        [*(("output_gradient_norm", name, norm) for name, norm in norms.items()), ("explosion_rate", "", rate)]
    )
