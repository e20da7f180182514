"""The places of a flow where a norm does no more than scale and shift every channel by numbers that stand fixed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from normkit.surgery.folding.flow import Flow, shape

aten = torch.ops.aten
_PASSES = (aten._to_copy.default, aten.to.dtype, aten.clone.default, aten.alias.default)
_TRAINING = (aten._native_batch_norm_legit.default, aten._native_batch_norm_legit_functional.default)


@dataclass(frozen=True)
class Constants:
    """The names of what a norm is made of; ``None``: it has none of it."""

    weight: str | None = None
    bias: str | None = None
    mean: str | None = None
    var: str | None = None
    skip: str | float | None = None
    """By what the norm's input is multiplied and added to its output: a parameter or a number."""
    eps: float = 0.0

    def parts(self) -> list[str]:
        """What belongs to the norm itself."""
        return [name for name in (self.weight, self.bias, self.mean, self.var) if name is not None]

    def names(self) -> list[str]:
        return self.parts() + ([self.skip] if isinstance(self.skip, str) else [])

    @property
    def shifts(self) -> bool:
        return self.bias is not None or self.mean is not None

    def affine(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Scale and shift of every channel, in float64."""
        wide = lambda name: tensors[name].detach().double()
        weight, bias = (None if name is None else wide(name) for name in (self.weight, self.bias))
        if self.mean is None or self.var is None:
            like = weight if weight is not None else bias
            assert like is not None  # a norm without both is no site
            return torch.ones_like(like) if weight is None else weight, bias
        rstd = (wide(self.var) + self.eps).rsqrt()
        scale = rstd if weight is None else rstd * weight
        shift = -wide(self.mean) * scale if bias is None else bias - wide(self.mean) * scale
        if self.skip is not None:
            scale = scale + (wide(self.skip).flatten() if isinstance(self.skip, str) else self.skip)
        return scale, shift


@dataclass(frozen=True, eq=False)
class Site:
    """One application of a norm."""

    flow: Flow
    output: Node
    axis: int
    owner: str
    """The module in whose forward it is."""
    constants: Constants
    input: Node | None = None
    """What all of the norm is a scale and a shift of; ``None``: only its weight and bias are."""
    inside: frozenset[Node] = frozenset()
    """The nodes that it consists of."""
    skip: Node | None = None
    """The addition of a skip around it, which is a part of it."""

    def home(self, model: nn.Module) -> str:
        """The module that has the norm's parameters: the owner, or a module below that the owner reads."""
        tensors = {id(_tensor(model, name)) for name in self.constants.parts()}
        has = lambda module: tensors <= {id(t) for t in (*module._parameters.values(), *module._buffers.values())}
        if has(model.get_submodule(self.owner)):
            return self.owner
        return next((name for name, module in model.named_modules() if has(module)), self.owner)

    @property
    def key(self) -> tuple[int | None, ...]:
        """The same for every application of the same norm."""
        c = self.constants
        return tuple(None if n is None else id(self.flow.tensor(n)) for n in (c.weight, c.bias, c.mean, c.var))


def _tensor(model: nn.Module, name: str) -> Tensor | None:
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    return module._parameters.get(own, module._buffers.get(own))


@dataclass(frozen=True)
class NoSite:
    """A norm that is none, with the reason."""

    owner: str
    reason: str
    nothing_to_do: bool = False


def find(flow: Flow) -> Iterator[Site | NoSite]:
    """Every norm of a flow, in its order."""
    for node in flow.nodes:
        if node.op == "call_function" and (found := _found(flow, node)) is not None:
            yield found


def _found(flow: Flow, node: Node) -> Site | NoSite | None:
    args: dict[int, Any] = dict(enumerate(node.args))
    owner, get = flow.owner(node), args.get
    if node.target is aten._native_batch_norm_legit_no_training.default:
        output = next((user for user in node.users if user.args[1] == 0), None)
        return None if output is None else _by_constants(flow, node, output, [*map(get, (1, 2, 3, 4))], args[6])
    if node.target is aten.instance_norm.default and not args[5]:
        return _by_constants(flow, node, node, [*map(get, (1, 2, 3, 4))], args[7])
    if node.target in _TRAINING:
        return NoSite(owner, "it normalises by the batch in evaluation too, and moves running statistics")
    if node.target is aten._native_batch_norm_legit.no_stats:
        output = next((user for user in node.users if user.args[1] == 0), None)
        return None if output is None else _affine_part(flow, node, output, 1, get(1), get(2))
    if node.target in (aten.layer_norm.default, aten.rms_norm.default):
        bias = get(3) if node.target is aten.layer_norm.default else None
        if len(args[1]) > 1 and get(2) is not None:
            return NoSite(owner, f"it has a weight for every element of {tuple(args[1])}, and not for every channel")
        return _affine_part(flow, node, node, len(shape(node)) - 1, get(2), bias)
    if node.target is aten.group_norm.default:
        return _affine_part(flow, node, node, 1, get(2), get(3))
    if node.target is aten.instance_norm.default:
        return _affine_part(flow, node, node, 1, get(1), get(2))
    if node.target is aten.mul.Tensor:
        return _written_out(flow, node, owner)
    return None


def _by_constants(flow: Flow, node: Node, output: Node, constants: list[Any], eps: float) -> Site | NoSite:
    owner = flow.owner(node)
    if any(constant is not None and constant not in flow.names for constant in constants):
        return NoSite(owner, "its weight or its statistics are computed anew in every call")
    x: Node = node.args[0]  # type: ignore[assignment]
    weight, bias, mean, var = (None if constant is None else flow.names[constant] for constant in constants)
    around = _skip_around(flow, x, output)
    if around is None:
        return Site(flow, output, 1, owner, Constants(weight, bias, mean, var, eps=eps), x, frozenset({node, output}))
    addition, other, factor = around
    inside = frozenset({node, output, addition, *([other] if other is not x else [])})
    constants_ = Constants(weight, bias, mean, var, factor, eps)
    return Site(flow, addition, 1, flow.owner(addition), constants_, x, inside, addition)


def _skip_around(flow: Flow, x: Node, output: Node) -> tuple[Node, Node, str | float] | None:
    """``norm(x) + factor * x``: the addition, its other summand, the factor."""
    readers = flow.readers(output)
    if len(readers) != 1 or readers[0].target is not aten.add.Tensor or readers[0].kwargs:
        return None
    addition = readers[0]
    other = next((arg for arg in addition.args if arg is not output), None)
    if other is x:
        return addition, x, 1.0
    if not isinstance(other, Node) or other.target is not aten.mul.Tensor or len(flow.readers(other)) != 1:
        return None
    factor = next((arg for arg in other.args if arg is not x), None)
    if x not in other.args or factor is None:
        return None
    if isinstance(factor, int | float):
        return addition, other, float(factor)
    if not isinstance(factor, Node) or factor not in flow.names:
        return None
    name, ndim = flow.names[factor], len(shape(x))
    sizes = [1] * (ndim - flow.tensor(name).dim()) + list(flow.tensor(name).shape)
    along_the_channels = len(sizes) == ndim and all(size == 1 for axis, size in enumerate(sizes) if axis != 1)
    return (addition, other, name) if along_the_channels else None


def _affine_part(flow: Flow, node: Node, output: Node, axis: int, weight: Any, bias: Any) -> Site | NoSite:
    owner = flow.owner(node)
    if weight is None and bias is None:
        return NoSite(owner, "it has no weight and no bias, and its statistics are those of the input", True)
    if any(constant is not None and constant not in flow.names for constant in (weight, bias)):
        return NoSite(owner, "its weight is computed anew in every call")
    name = lambda constant: None if constant is None else flow.names[constant]
    constants = Constants(weight=name(weight), bias=name(bias))
    return Site(flow, output, axis, owner, constants, inside=frozenset({node, output}))


def _written_out(flow: Flow, node: Node, owner: str) -> Site | None:
    """``weight * (x * rsqrt(mean(x**2) + eps))``, as most language models write their RMS norm."""
    weight = next((arg for arg in node.all_input_nodes if arg in flow.names), None)
    product = next((arg for arg in node.all_input_nodes if arg is not weight), None)
    while product is not None and product.target in _PASSES:
        product = product.all_input_nodes[0]
    if weight is None or product is None or product.target is not aten.mul.Tensor:
        return None
    by_a_root = any(factor.target is aten.rsqrt.default for factor in product.all_input_nodes)
    if not by_a_root or flow.tensor(flow.names[weight]).dim() != 1:
        return None
    constants = Constants(weight=flow.names[weight])
    return Site(flow, node, len(shape(node)) - 1, owner, constants, inside=frozenset({node}))
