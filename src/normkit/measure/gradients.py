"""Gradients: how large they are, layer by layer, and against the weights that they change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normkit.measure.sites import wide
from normkit.vocabulary.quantity import Quantity

QUANTITIES = (
    Quantity("gradient_norm", "gradients", "", "||g||", per="parameter", means="The length of a gradient."),
    Quantity(
        "gradient_to_weight",
        "gradients",
        "",
        "||g|| / ||w||, of parameters with two or more axes",
        per="parameter",
        means="The length of a gradient beside that of its weight.",
    ),
    Quantity("gradient_nonfinite", "gradients", "values", "NaN or infinite values in the gradient", per="parameter"),
    Quantity(
        "gradient_along_weight",
        "gradients",
        "",
        "|<g, w>| / (||g|| ||w||), of parameters with two or more axes; 0 for one whose scale does not matter",
        "van Laarhoven 2017, arXiv:1706.05350",
        per="parameter",
        means="How much of a gradient points along its weight.",
    ),
    Quantity(
        "gradient_growth",
        "gradients",
        "per layer",
        "factor on ||g||² per layer towards the input: least squares on log ||g||² of all weight matrices, in order",
        "Yang et al. 2019, arXiv:1902.08129",
        per="model",
        means="By which factor squared gradients grow from a layer to the one before it.",
    ),
    Quantity(
        "gradient_ratio",
        "gradients",
        "",
        "||g|| of the first weight matrix / ||g|| of the last",
        "Yang et al. 2019, arXiv:1902.08129",
        per="model",
        means="The gradient of the first layer beside that of the last.",
    ),
)

Pairs = Mapping[str, tuple[Tensor, Tensor | None]]
"""By name, a parameter and its gradient."""


def of_step(model: nn.Module) -> dict[str, tuple[Tensor, Tensor | None]]:
    """The gradients as the training step has left them in the parameters."""
    return {name: (weight, weight.grad) for name, weight in model.named_parameters()}


def of_loss(model: nn.Module, loss: Tensor) -> dict[str, tuple[Tensor, Tensor | None]]:
    """The gradients of a loss; ``.grad`` stays as it is."""
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if not trained or not loss.requires_grad:
        return {}
    taken = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {name: (weight, grad) for (name, weight), grad in zip(trained.items(), taken, strict=True)}


def read(pairs: Pairs, wanted: frozenset[str]) -> Iterator[tuple[str, str, Tensor]]:
    """What these gradients say, by parameter and for the model."""
    norms: list[Tensor] = []
    with torch.no_grad():
        for name, (weight, gradient) in pairs.items():
            if gradient is None or not gradient.numel():
                continue
            found = _one(weight, gradient, wanted)
            if weight.dim() > 1:
                norms.append(found["gradient_norm"])
            yield from ((quantity, name, value) for quantity, value in found.items() if quantity in wanted)
        yield from ((quantity, "", value) for quantity, value in growth(norms).items() if quantity in wanted)


def _one(weight: Tensor, gradient: Tensor, wanted: frozenset[str]) -> dict[str, Tensor]:
    gradient = wide(gradient.to_dense() if gradient.is_sparse else gradient)
    norm = gradient.norm()
    found: dict[str, Any] = {"gradient_norm": norm}
    if "gradient_nonfinite" in wanted:
        found["gradient_nonfinite"] = (~gradient.isfinite()).sum()
    if weight.dim() > 1 and wanted & {"gradient_to_weight", "gradient_along_weight"}:
        values = wide(weight)
        length = values.norm()
        found["gradient_to_weight"] = norm / length
        # dividing first: the product of two small numbers is no number in float32
        found["gradient_along_weight"] = ((gradient / norm) * (values / length)).sum().abs()
    return found


def growth(norms: list[Tensor]) -> dict[str, Tensor]:
    """From the gradient norms of the weight matrices, the first layer's first."""
    if len(norms) < 2:
        return {}
    logs = 2 * torch.stack([norm.to(norms[0].device) for norm in norms]).log()
    depth = torch.arange(len(norms) - 1, -1, -1, dtype=logs.dtype, device=logs.device)
    depth = depth - depth.mean()
    slope = (depth * logs).sum() / depth.square().sum()
    return {"gradient_growth": slope.exp(), "gradient_ratio": norms[0] / norms[-1].to(norms[0].device)}
