"""The residual blocks in the graph of a model, and what becomes of each layer when the norms go."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from normkit.surgery import recast

ALPHA, ADDED = 0.2, 0.5
"""How much a branch adds at first (Brock et al. 2021); less in a long run of blocks whose shortcuts have no weights, so
that together they add no more than that variance."""
WEIGHTS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""What is standardised, exactly these: a subclass may compute something else."""
_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")


@dataclass
class Block:
    """One sum of a shortcut and a branch, as nodes of the graph."""

    total: fx.Node
    fork: fx.Node
    """Where the two part."""
    branch: list[fx.Node]
    shortcut: list[fx.Node]
    end: fx.Node = field(init=False)
    """The sum, or the activation that alone reads it: what the block gives."""

    def __post_init__(self) -> None:
        readers = [*self.total.users]
        alone = len(readers) == 1 and not readers[0].kwargs.get("residual") and len(readers[0].all_input_nodes) == 1
        self.end = readers[0] if alone and readers[0].op != "output" and _keeps_shape(readers[0]) else self.total


@dataclass
class Roles:
    """By name of the module, what becomes of it."""

    weights: list[str] = field(default_factory=list)
    """Standardised."""
    leaving: list[str] = field(default_factory=list)
    """Norms at the end of a branch: one learned number."""
    inner: list[str] = field(default_factory=list)
    """Norms whose scale the weights behind or in front of them make up for."""
    entering: list[str] = field(default_factory=list)
    """Norms that read the trunk: one fixed number, so that their output has variance 1."""
    trunk: dict[str, fx.Node] = field(default_factory=dict)
    """Norms of the trunk: one fixed number, so that this node has variance 1."""
    last: list[str] = field(default_factory=list)
    """Weights at the end of a branch that has no norm there: their gain is ``alpha`` times as large."""
    alpha: float = ALPHA


def traced(model: nn.Module) -> fx.Graph:
    try:
        return fx.symbolic_trace(model).graph
    except Exception as error:  # whatever a forward raises when it is given stand-ins
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f'convert_(to="normalizer-free"): {type(model).__name__} cannot be traced, so its residual blocks are not '
            f"known.\n  torch.fx: {first}\n  build it of nk.blocks.NormalizerFreeResidual instead"
        ) from error


def _keeps_shape(node: fx.Node) -> bool:
    """Whether it may be an activation: no pooling, no reshaping, no weights."""
    if node.op == "call_module":
        kind = type(node.graph.owning_module.get_submodule(str(node.target)))  # type: ignore[union-attr]
        return kind.__module__ == "torch.nn.modules.activation"
    return getattr(node.target, "__name__", str(node.target)) in ("relu", "relu_", "silu", "gelu", "leaky_relu", "tanh")


def blocks_of(graph: fx.Graph, modules: dict[str, nn.Module]) -> list[Block]:
    order = {node: place for place, node in enumerate(graph.nodes)}
    before: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in graph.nodes:
        before[node] = frozenset(node.all_input_nodes).union(*(before[read] for read in node.all_input_nodes))
    found = []
    for node in graph.nodes:
        if (
            node.target not in _SUMS
            or len(node.all_input_nodes) != 2
            or node.op not in ("call_function", "call_method")
        ):
            continue
        sides = [before[read] | {read} for read in node.all_input_nodes]
        common = sides[0] & sides[1]
        if not common:
            continue
        fork = max(common, key=order.__getitem__)
        parts = [sorted(side - common, key=order.__getitem__) for side in sides]
        weighty = [sum(_weight(n, modules) is not None for n in part) for part in parts]
        if weighty[0] == weighty[1]:
            continue
        branch, shortcut = parts if weighty[0] > weighty[1] else parts[::-1]
        found.append(Block(node, fork, branch, shortcut))
    if not found:
        raise ValueError(
            'convert_(to="normalizer-free"): the graph has no sum of a shortcut and a branch with weights.\n'
            "  a network without skips keeps its norms, or gets others: nk.convert_(model, to='group:auto')"
        )
    return found


def _weight(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    return module if type(module) in WEIGHTS else None


def _norm(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    return module if module is not None and not isinstance(module, nn.Identity) and recast.is_norm(module) else None


def roles_of(graph: fx.Graph, modules: dict[str, nn.Module], blocks: list[Block]) -> Roles:
    roles = Roles(alpha=alpha_of(blocks, modules))
    forks = [block.fork for block in blocks]
    order = {node: place for place, node in enumerate(graph.nodes)}
    within = {node: block for block in blocks for node in (*block.branch, *block.shortcut)}
    first, end = min(map(order.__getitem__, forks)), blocks[-1].end
    seen: set[str] = set()
    for node in graph.nodes:
        weight, norm = _weight(node, modules), _norm(node, modules)
        name = str(node.target)
        if weight is None and norm is None:
            continue
        if name in seen or node.kwargs.get("residual") is not None:
            raise ValueError(
                f'convert_(to="normalizer-free"): {name} is called twice or has a residual= inside; write it out'
            )
        seen.add(name)
        block = within.get(node)
        if weight is not None:
            if block is not None or order[node] <= first:
                roles.weights.append(name)
                if (
                    block is not None
                    and node in block.branch
                    and not _any(block.branch, node, modules, (_weight, _norm))
                ):
                    roles.last.append(name)
        elif block is not None and node in block.branch:
            if not _any(block.branch, node, modules, (_weight,)):
                roles.leaving.append(name)
            elif not _any(block.branch, node, modules, (_weight,), behind=False):
                roles.entering.append(name)
            else:
                roles.inner.append(name)
        elif order[node] > order[end]:
            roles.entering.append(name)
        else:
            later = [fork for fork in forks if order[fork] > order[node]]
            roles.trunk[name] = later[0] if later else end
    return roles


def alpha_of(blocks: list[Block], modules: dict[str, nn.Module]) -> float:
    longest = run = 0
    for block in blocks:
        run = 0 if any(_weight(node, modules) for node in block.shortcut) else run + 1
        longest = max(longest, run)
    return min(ALPHA, math.sqrt(ADDED / max(longest, 1)))


def _any(part: list[fx.Node], node: fx.Node, modules: dict[str, nn.Module], kinds: Any, *, behind: bool = True) -> bool:
    place = part.index(node)
    others = part[place + 1 :] if behind else part[:place]
    return any(kind(other, modules) is not None for other in others for kind in kinds)


def name_of(block: Block) -> str:
    """What the modules of a branch have in common, or the name of the first."""
    names = [str(node.target) for node in block.branch if node.op == "call_module"]
    parents = {name.rpartition(".")[0] for name in names}
    return parents.pop() if len(parents) == 1 else names[0]
