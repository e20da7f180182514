"""``torch.compile(model, backend="normkit")``: torch finds :func:`normkit` through its group of entry points.

Dynamo captures the model, whatever way it was written; normkit takes over the norms of the graph with the additions
and activations that follow them, and hands the graph on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from normkit import fusion

_OPTIONS = {"inner": "eager"}


def normkit(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[torch.Tensor],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend: torch calls it with every graph it captures.

    Args:
        graph_module: captured by Dynamo; changed in place.
        example_inputs: of the graph.
        mode: handed on to the inner backend.
        options: ``{"inner": name}``: who runs the graph afterwards. ``"eager"`` (default), ``"inductor"``,
            ``"aot_eager"`` or any other backend of torch; the remaining options are handed on to it.

    Raises:
        ValueError: an inner backend that torch does not know; options that ``"eager"`` does not take.
    """
    given = {**_OPTIONS, **(options or {})}
    inner = given.pop("inner")
    host = _Host(graph_module)
    patterns, _ = fusion.find(graph_module.graph, host)
    for pattern in patterns:
        fusion.rewrite(graph_module.graph, pattern, shapes_known=True)
    graph_module.recompile()
    if inner == "eager":
        if given or mode:
            raise ValueError(_unused(given, mode))
        return graph_module.forward
    handed_on = {key: value for key, value in (("mode", mode), ("options", given)) if value}
    return _inner(inner)(graph_module, example_inputs, **handed_on)


def _inner(name: str) -> Callable[..., Any]:
    from torch._dynamo import list_backends, lookup_backend

    names = [known for known in list_backends(exclude_tags=()) if known != "normkit"]
    if name not in names:
        raise ValueError(f"backend normkit: there is no inner backend {name!r}.\n  choose from: {', '.join(names)}")
    return lookup_backend(name)


def _unused(options: Mapping[str, Any], mode: str | None) -> str:
    given = [*(f"options[{name!r}]" for name in options), *(["mode"] if mode else [])]
    return (
        f'backend normkit: inner="eager" has no use for {", ".join(given)}.\n'
        '  leave them out, or say options={"inner": "inductor", ...} to hand them on to Inductor'
    )


@dataclass
class _Host:
    """What Dynamo knows about its graph: every norm is a function, and every value has a shape and a type."""

    graph_module: fx.GraphModule

    def module_of(self, target: str) -> nn.Module:
        return self.graph_module.get_submodule(target)

    def is_norm(self, node: fx.Node) -> bool:
        return node.op == "call_function" and node.target in fusion.FUNCTIONS

    def may_add(self, norm: fx.Node, residual: fx.Node) -> bool:
        x = norm.args[0] if norm.args else norm.kwargs["input"]
        a, b = (node.meta.get("example_value") if isinstance(node, fx.Node) else None for node in (x, residual))
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or a.dtype != b.dtype:
            return False
        return [_size(size) for size in a.shape] == [_size(size) for size in b.shape]

    def against(self, node: fx.Node) -> str | None:
        return None


def _size(size: int | torch.SymInt) -> Any:
    """A size as a number or an expression; comparing symbolic sizes themselves would specialise the graph."""
    return size.node.expr if isinstance(size, torch.SymInt) else size
