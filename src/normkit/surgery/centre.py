"""Layer norm as RMS norm, exactly: where the layer before it can take the mean out, and those behind it the bias.

``layer_norm(x) = rms_norm(x - mean(x)) + bias``. The mean over the outputs of ``x = W h + b`` is that of the columns of
W and of b; without it in W and b, x has mean 0 whatever h is. What is added behind the norm, the next linear layers can
have added to their own bias.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from normkit.surgery.shortcut import has_hooks

_BEFORE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Pairs = list[tuple[Tensor, Tensor]]
"""Where to write what."""


@dataclass(frozen=True)
class Centred:
    """Who has to help so that the norm may be an RMS norm; the names of layers."""

    before: str
    """Takes the mean out."""
    behind: tuple[str, ...]
    """Take the bias of the norm."""

    def words(self) -> str:
        bias = f", {' and '.join(self.behind)} its bias" if self.behind else ""
        return f"exactly: {self.before} takes the mean out{bias}"


def centred(model: nn.Module, norms: dict[str, nn.LayerNorm]) -> dict[str, Centred | str]:
    """By name, how each layer norm becomes an RMS norm exactly, or in words why it does not."""
    if not norms:
        return {}
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:
        first = str(error).partition("\n")[0]
        return dict.fromkeys(norms, f"what comes before and behind it is not known: {type(error).__name__}: {first}")
    return {name: _centred(model, graph, name, norm) for name, norm in norms.items()}


@torch.no_grad()
def rewritten(model: nn.Module, found: dict[str, Centred]) -> dict[str, Pairs]:
    """By name of each helping layer, its new weight and bias. A layer may take in one bias and let go of a mean."""
    wide: dict[str, list[Tensor]] = {}
    layer: Callable[[str], Any] = model.get_submodule
    of = lambda name: wide.setdefault(
        name, [t.double() for t in (layer(name).weight, layer(name).bias) if t is not None]
    )
    for norm, way in found.items():
        for name in way.behind:
            weight, bias = of(name)
            wide[name] = [weight, bias + weight @ layer(norm).bias.double()]
    for way in found.values():
        wide[way.before] = [tensor - tensor.mean(0) for tensor in of(way.before)]  # outputs are the first axis
    places = {name: [t for t in (layer(name).weight, layer(name).bias) if t is not None] for name in wide}
    return {name: list(zip(places[name], values, strict=True)) for name, values in wide.items()}


def _centred(model: nn.Module, graph: fx.Graph, name: str, norm: nn.LayerNorm) -> Centred | str:
    calls = [node for node in graph.nodes if node.op == "call_module" and model.get_submodule(node.target) is norm]
    if len(calls) != 1 or len(calls[0].args) != 1 or calls[0].kwargs:
        return "it is not called once, with its input alone"
    (call,) = calls
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    source = call.args[0]
    if not isinstance(source, fx.Node) or (reason := _against(model, graph, source, owners, _BEFORE)):
        return f"its input comes from {source}, which cannot take the mean out" + (f": {reason}" if reason else "")
    if len(source.users) != 1:
        return f"{source.target} has other readers, who need its mean"
    before: Any = model.get_submodule(str(source.target))
    if norm.normalized_shape != before.weight.shape[:1]:
        return f"it normalises over other axes than the outputs of {source.target}"
    readers = list(call.users) if norm.bias is not None and bool((norm.bias != 0).any()) else []
    for reader in readers:
        if reason := _against(model, graph, reader, owners, (nn.Linear,)):
            return f"its bias has nowhere to go: {reason} ({reader})"
        if model.get_submodule(str(reader.target)).bias is None:
            return f"its bias has nowhere to go: {reader.target} has none"
    return Centred(str(source.target), tuple(str(reader.target) for reader in readers))


def _against(model: nn.Module, graph: fx.Graph, node: fx.Node, owners: Counter[int], kinds: tuple[type, ...]) -> str:
    """Why the layer that a node calls may not get other weights; empty: it may."""
    if node.op != "call_module":
        return "it is no layer"
    layer = model.get_submodule(str(node.target))
    if parametrize.is_parametrized(layer) or has_hooks(layer):
        return "it has hooks or parametrizations"
    if type(layer) not in kinds:
        return f"it is {type(layer).__name__}"
    if any(owners[id(p)] > 1 for p in layer.parameters(recurse=False)):
        return "it shares its weights"
    same = [n for n in graph.nodes if n.op == "call_module" and model.get_submodule(str(n.target)) is layer]
    return "it is called more than once" if len(same) > 1 else ""
