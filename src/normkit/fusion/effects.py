"""Which nodes of a graph may write into which tensors. Conservative: what is not known to be harmless is not."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node

_MODULES_THAT_MAKE_NEW_TENSORS = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
)
_FUNCTIONS_THAT_MAKE_NEW_TENSORS: frozenset[object] = frozenset(
    [operator.add, operator.sub, operator.mul, operator.truediv, operator.matmul, operator.neg]
    + [
        getattr(torch, name)
        for name in ("add", "sub", "mul", "div", "matmul", "bmm", "cat", "stack", "relu", "sigmoid")
    ]
    + [getattr(torch, f"conv{suffix}") for suffix in ("1d", "2d", "3d", "_transpose2d")]
    + [getattr(F, name) for name in ("linear", "conv1d", "conv2d", "conv3d", "relu", "gelu", "silu", "softmax")]
    + [getattr(F, f"{kind}_norm") for kind in ("batch", "layer", "group", "instance", "rms")]
)
_MAKERS_OF_NUMBERS = frozenset({"size", "dim", "numel", "stride", "is_contiguous"})
_HOMES = ("torch", "_operator", "builtins", "math", "normkit")


class Effects:
    """Of one graph. Two nodes may share memory when they have the same root."""

    def __init__(self, graph: Graph, module_of: Callable[[str], nn.Module]) -> None:
        self.module_of = module_of
        self._parent: dict[Node, Node] = {}
        for node in graph.nodes:
            self._parent[node] = node
            if not self._makes_a_new_tensor(node):
                for source in node.all_input_nodes:
                    self._parent[self._root(source)] = self._root(node)

    def may_share_memory(self, a: Node, b: Node) -> bool:
        return self._root(a) is self._root(b)

    def may_write(self, node: Node) -> list[Node]:
        """The arguments that the node may change in place."""
        sources = node.all_input_nodes
        if node.op == "call_module":
            return [] if _harmless(self.module_of(str(node.target))) else sources
        if node.op == "call_method":
            name = str(node.target)
            in_place = name.endswith("_") and (not name.endswith("__") or name.startswith("__i") or "set" in name)
            return sources[:1] if in_place else []
        if node.op != "call_function":
            return []
        if node.kwargs.get("out") is not None:
            return sources
        if node.target in (F.batch_norm, F.instance_norm):
            return [source for source in sources if source is not node.args[0]]  # the running statistics
        name = getattr(node.target, "__name__", "")
        if _writes_in_place(node):
            return sources[:1]
        known = (getattr(node.target, "__module__", None) or "torch").partition(".")[0] in _HOMES
        return [] if known and name else sources

    def writes_between(self, first: Node, last: Node, tensors: list[Node]) -> Node | None:
        """The first node strictly between two others that may write into one of the tensors."""
        node = first.next
        while node is not last:
            for written in self.may_write(node):
                if any(self.may_share_memory(written, tensor) for tensor in tensors):
                    return node
            node = node.next
        return None

    def reads_between(self, first: Node, last: Node, tensors: list[Node]) -> Node | None:
        """The first node strictly between two others that is given memory of one of the tensors."""
        node = first.next
        while node is not last:
            if any(self.may_share_memory(source, tensor) for source in node.all_input_nodes for tensor in tensors):
                return node
            node = node.next
        return None

    def _root(self, node: Node) -> Node:
        while self._parent[node] is not node:
            self._parent[node] = self._parent[self._parent[node]]
            node = self._parent[node]
        return node

    def _makes_a_new_tensor(self, node: Node) -> bool:
        if node.op == "call_module":
            return isinstance(self.module_of(str(node.target)), _MODULES_THAT_MAKE_NEW_TENSORS)
        if node.op == "call_function":
            return node.target in _FUNCTIONS_THAT_MAKE_NEW_TENSORS and not _writes_in_place(node)
        return node.op == "call_method" and node.target in _MAKERS_OF_NUMBERS


def _harmless(module: nn.Module) -> bool:
    """Whether every part of it is torch's own and none works in place."""
    return all(
        type(part).__module__.partition(".")[0] in ("torch", "normkit") and not getattr(part, "inplace", False)
        for part in module.modules()
    )


def _writes_in_place(node: Node) -> bool:
    """``out += x``, ``x[0] = y``, ``torch.relu_(x)``, ``F.relu(x, inplace=True)``."""
    name = getattr(node.target, "__name__", "")
    if getattr(operator, name, None) is node.target:
        return name in ("setitem", "delitem") or (name.startswith("i") and hasattr(operator, f"__{name[1:]}__"))
    if name.endswith("_") and not name.endswith("__"):
        return True
    place = _place_of_inplace(node.target)
    positional = place is not None and len(node.args) > place and node.args[place]
    return bool(node.kwargs.get("inplace") or positional)


@lru_cache(maxsize=256)
def _place_of_inplace(function: object) -> int | None:
    try:
        names = list(inspect.signature(function).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a builtin without a signature
        return None
    return names.index("inplace") if "inplace" in names else None
