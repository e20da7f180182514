"""Which node is an activation that a norm can carry out, whatever way it was written."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node

from normkit import epilogue

_WITHOUT_ARGUMENT: dict[Any, str] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    "relu": "relu",
    "relu_": "relu",
    F.silu: "silu",
}
_LEAKY = (F.leaky_relu, F.leaky_relu_)


@dataclass(frozen=True)
class Activation:
    """A name that normkit knows, with its one argument where it is not the default; or the module that is called."""

    name: str = ""
    argument: float | str | None = None
    module: str | None = None
    """The target of the node: the module is looked up when the graph runs."""

    def write(self, graph: Graph) -> Any:
        """The value for ``activation=`` at the graph's insertion point."""
        if self.module is not None:
            return graph.create_node("get_attr", self.module)
        if self.argument is None:
            return self.name
        return graph.call_function(with_argument, (self.name, self.argument))

    @property
    def words(self) -> str:
        return self.name


@lru_cache(maxsize=64)
def with_argument(name: str, argument: float | str) -> nn.Module:
    """The activation as a module, which is how a kernel is told an argument."""
    return nn.GELU(approximate=str(argument)) if name == "gelu" else nn.LeakyReLU(float(argument))


def of_module(module: nn.Module, target: str) -> Activation | None:
    """By exact type: a subclass may compute something else."""
    name, _ = epilogue.fusible(module)
    return None if name in (None, "module") else Activation(str(name), module=target)


def of_function(node: Node) -> Activation | None:
    """Of a ``call_function`` or ``call_method`` node."""
    if node.target in _WITHOUT_ARGUMENT:
        return Activation(_WITHOUT_ARGUMENT[node.target])
    if node.target in _LEAKY:
        slope = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
        return Activation("leaky_relu", None if slope == 0.01 else slope) if isinstance(slope, float | int) else None
    if node.target is F.gelu:
        form = node.args[1] if len(node.args) > 1 else node.kwargs.get("approximate", "none")
        return Activation("gelu", None if form == "none" else form) if isinstance(form, str) else None
    return None


_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_IN_PLACE = (operator.iadd, "add_")


def added_to(node: Node, addition: Node) -> tuple[Node, bool] | None:
    """The other summand where ``addition`` adds a tensor to ``node``, and whether it does so in place."""
    if addition.target not in _ADDITIONS or addition.op not in ("call_function", "call_method"):
        return None
    alpha = addition.kwargs.get("alpha", 1)
    first, second = (*addition.args, None, None)[:2]
    second = addition.kwargs.get("other", second)
    if alpha != 1 or len(addition.args) > 2 or "out" in addition.kwargs:
        return None
    if not isinstance(first, Node) or not isinstance(second, Node) or first is second:
        return None
    return (second if first is node else first), addition.target in _IN_PLACE
