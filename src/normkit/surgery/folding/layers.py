"""The layers that can take in a scale and a shift per channel, and the arithmetic of it, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import Node

from normkit.surgery.folding.flow import Flow, shape
from normkit.surgery.shortcut import has_hooks

aten = torch.ops.aten
Kind = Literal["linear", "conv", "transposed"]
_CONVS: dict[Any, int] = {
    aten.conv1d.default: 1,
    aten.conv1d.padding: 1,
    aten.conv2d.default: 2,
    aten.conv2d.padding: 2,
    aten.conv3d.default: 3,
    aten.conv3d.padding: 3,
}
_TRANSPOSED: dict[Any, int] = {
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 2,
    aten.conv_transpose3d.input: 3,
}
_GROUPS = 6  # where both kinds of convolution have them
_WITH_A_BIAS = (nn.Linear, nn.modules.conv._ConvNd)


@dataclass(frozen=True)
class Use:
    """One call of a layer."""

    node: Node
    kind: Kind
    owner: str
    weight: str
    bias: str | None
    axis: int
    """Where the channels are, in what goes in as in what comes out."""
    groups: int = 1
    pads: bool = False
    """With zeros, so that not everything that it reads has come through the norm."""


def is_layer(node: Node) -> bool:
    return node.target is aten.linear.default or node.target in _CONVS or node.target in _TRANSPOSED


def use(flow: Flow, node: Node) -> Use | str:
    """The layer that a node calls, or why its weight cannot be changed."""
    args: dict[int, Any] = dict(enumerate(node.args))
    owner = flow.owner(node)
    weight, bias = flow.names.get(args[1]), args.get(2)
    if weight is None or (bias is not None and bias not in flow.names):
        what = f"{'weight' if weight is None else 'bias'} of {owner or 'the layer'}"
        return f"the {what} is computed in every call (a parametrization, or a part of another weight)"
    if not flow.tensor(weight).is_floating_point():
        return f"the weight of {owner or 'the layer'} is {flow.tensor(weight).dtype}"
    names = (owner, weight, None if bias is None else flow.names[bias])
    if node.target is aten.linear.default:
        return Use(node, "linear", *names, axis=len(shape(node)) - 1)
    dims = _CONVS.get(node.target) or _TRANSPOSED[node.target]
    axis, groups = len(shape(node)) - 1 - dims, args.get(_GROUPS, 1)
    if node.target in _TRANSPOSED:
        return Use(node, "transposed", *names, axis, groups)
    padding = args.get(4, 0)
    pads = padding == "same" or (padding != "valid" and any(padding if isinstance(padding, list) else [padding]))
    return Use(node, "conv", *names, axis, groups, pads)


def reason_against(model: nn.Module, used: Use) -> str | None:
    """Why a layer has to stay what it is, as a clause."""
    if used.owner and has_hooks(model.get_submodule(used.owner)):
        return f"{used.owner} has hooks, which would see another value"
    return None


def reason_against_a_bias(model: nn.Module, used: Use) -> str | None:
    """Why a layer without a bias cannot get one, as a clause."""
    if used.bias is not None:
        return None
    module = model.get_submodule(used.owner)
    code = getattr(type(module).forward, "__code__", None)
    reads = code is not None and "bias" in code.co_names
    if isinstance(module, _WITH_A_BIAS) and reads and f"{used.owner}.weight".lstrip(".") == used.weight:
        return None
    return f"{used.owner or 'the model'} has no bias, and its forward ({type(module).__name__}) would not add one"


def behind(used: Use, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of the layer that computes ``scale * layer(x) + shift``."""
    rows = (-1, *[1] * (weight.dim() - 1))
    if used.kind == "transposed":  # (in, out / groups, ...): the outputs of a group lie in the rows of its inputs
        parts = weight.unflatten(0, (used.groups, -1))
        scaled = (parts * scale.view(used.groups, 1, -1, *[1] * (weight.dim() - 2))).flatten(0, 1)
    else:
        scaled = weight * scale.view(rows)
    return scaled, shift if bias is None else bias * scale + shift


def ahead(
    used: Use, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the layer that computes ``layer(scale * x + shift)``; nothing of x may be padding."""
    ones = [1] * (weight.dim() - 2)
    if used.kind == "transposed":
        return weight * scale.view(-1, 1, *ones), bias
    parts = weight.unflatten(0, (used.groups, -1))  # (group, out, in of the group, ...)
    scaled = (parts * scale.view(used.groups, 1, -1, *ones)).flatten(0, 1)
    if shift is None:
        return scaled, bias
    shifted = (parts * shift.view(used.groups, 1, -1, *ones)).flatten(2).sum(2).flatten()
    return scaled, shifted if bias is None else bias + shifted
