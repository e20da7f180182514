"""Writes normkit's call in the place of a pattern."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node

from normkit import epilogue, functional
from normkit.fusion.match import Pattern

FUNCTIONS: dict[Callable[..., Tensor], Callable[..., Tensor]] = {
    getattr(F, name): getattr(functional, name)
    for name in ("batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm")
}
"""torch's function -> normkit's. The two take the same arguments in the same order."""


def rewrite(graph: Graph, pattern: Pattern, *, shapes_known: bool) -> Node:
    """Replace the nodes of the pattern by one, which is returned.

    Args:
        graph: changed in place.
        pattern: found in it.
        shapes_known: the residual is known to have the shape and the type of the input; otherwise the call looks when
            it runs, and does the steps one by one where it has not.
    """
    last = pattern.last
    with graph.inserting_before(last):
        activation = None if pattern.activation is None else pattern.activation.write(graph)
        if pattern.norm.op == "call_module":
            norm: Any = graph.create_node("get_attr", str(pattern.norm.target))
            x, rest = pattern.norm.args[0], None
        else:
            norm, (x, *rest) = _normkit_call(pattern.norm)
        if rest is not None and (shapes_known or pattern.residual is None):
            keywords = {"residual": pattern.residual, "activation": activation}
            new = graph.call_function(norm, (x, *rest), {k: v for k, v in keywords.items() if v is not None})
        else:
            then = (x, pattern.residual, activation, pattern.in_place)
            if rest is None:
                new = graph.call_function(apply_module, (norm, *then))
            else:  # by name: generated code has no way to write a function as an argument
                new = graph.call_function(apply_function, (norm.__name__, *then, tuple(rest)))
    new.meta = dict(last.meta)
    last.replace_all_uses_with(new)
    for node in (pattern.called, pattern.addition, pattern.norm):
        if node is not None:
            graph.erase_node(node)
    return new


def _normkit_call(node: Node) -> tuple[Callable[..., Tensor], list[Any]]:
    """normkit's function for a functional norm of torch, and its arguments in order."""
    function = node.target
    bound = inspect.signature(function).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    bound.apply_defaults()
    return FUNCTIONS[function], list(bound.arguments.values())  # type: ignore[index]


def apply_module(
    norm: nn.Module, x: Tensor, residual: Tensor | None, activation: epilogue.Activation, in_place: bool
) -> Tensor:
    """``activation(norm(x) + residual)`` with a normkit layer, in one call."""
    if residual is not None and not _fits(x, residual):
        return _step_by_step(norm(x), residual, activation, in_place)
    # The layer as its forward sees it, but with this activation: for one call, so that the layer itself stays what it
    # is for everybody else who calls it, in another thread too. Parameters and buffers are in dicts that both share.
    once = object.__new__(type(norm))
    vars(once).update(vars(norm))
    vars(once)["activation"] = activation
    return once.forward(x, residual=residual)


def apply_function(
    name: str, x: Tensor, residual: Tensor | None, activation: epilogue.Activation, in_place: bool, rest: tuple
) -> Tensor:
    """``activation(function(x, *rest) + residual)`` with normkit's function of this name, in one call."""
    function = getattr(functional, name)
    if residual is not None and not _fits(x, residual):
        return _step_by_step(function(x, *rest), residual, activation, in_place)
    return function(x, *rest, residual=residual, activation=activation)


def _fits(x: Tensor, residual: Any) -> bool:
    """Broadcasting is not fused; nor are two types, whose sum has one type in place and another out of place."""
    return isinstance(residual, Tensor) and residual.shape == x.shape and residual.dtype == x.dtype


def _step_by_step(y: Tensor, residual: Any, activation: epilogue.Activation, in_place: bool) -> Tensor:
    if in_place:
        y += residual
        return epilogue.apply(y, None, activation)
    return epilogue.apply(y + residual, None, activation)
