"""``nk.convert_(model, to="normalizer-free")``: a residual network keeps its variance without its norms.

What the norms did is done by the weights (standardised, with a gain that brings each layer's output to variance 1), by
one learned number per branch, and by one fixed number in the place of each norm of the trunk.
"""

from __future__ import annotations

import copy
import inspect
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from normkit.blocks.residual import Scale
from normkit.blocks.weight_standardized import ScaledWSConv1d, ScaledWSConv2d, ScaledWSConv3d, ScaledWSLinear
from normkit.surgery import recast
from normkit.surgery.batches import Call
from normkit.surgery.become import Become
from normkit.surgery.fit import Run, two_runs
from normkit.surgery.operate import Plan
from normkit.vocabulary.prescription import Prescription
from normkit.vocabulary.reading import Reading

NAMES = ("normalizer-free", "normalizer_free", "nf")
ALPHA, ADDED = 0.2, 0.5
"""How much a branch adds at first (Brock et al. 2021); less in a long run of blocks whose shortcuts have no weights, so
that together they add no more than that variance."""
LEAST, MOST = 0.5, 2.0
"""Between which the variance behind every block must be."""
ROUNDS = 3
"""How often the trunk is measured: a sum is not proportional to its shortcut, but nearly."""
STANDARDIZED: dict[type, type] = {
    nn.Conv1d: ScaledWSConv1d,
    nn.Conv2d: ScaledWSConv2d,
    nn.Conv3d: ScaledWSConv3d,
    nn.Linear: ScaledWSLinear,
}
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


def is_meant(to: Any) -> bool:
    """Whether ``to`` of :func:`normkit.convert_` asks for this."""
    return isinstance(to, str) and to.lower() in NAMES


def plan(model: nn.Module, match: Any, call: Call | None = None) -> Plan:
    """What would be done: everything is tried on a copy, on a batch, and measured on another.

    Raises:
        ValueError: no batch; no graph, or one without residual blocks; a variance outside of the limits.
    """
    if match is None:
        raise ValueError(
            'convert_(to="normalizer-free"): the gains are measured on data; give match=, a batch of some dozen samples'
        )
    trial = copy.deepcopy(model)
    graph = _traced(trial)
    modules = dict(trial.named_modules())
    blocks = _blocks(graph, modules)
    roles = _roles(graph, modules, blocks)
    runs = two_runs(match, call)
    fresh = _replace(trial, roles)
    _calibrate(trial, graph, roles, fresh, runs[0])
    intended = Plan("convert_", model)
    _check(intended, trial, graph, blocks, runs[1])
    _add_steps(intended, roles, fresh)
    return intended


def _traced(model: nn.Module) -> fx.Graph:
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


def _blocks(graph: fx.Graph, modules: dict[str, nn.Module]) -> list[Block]:
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
    return module if type(module) in STANDARDIZED else None


def _norm(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    return module if module is not None and not isinstance(module, nn.Identity) and recast.is_norm(module) else None


def _roles(graph: fx.Graph, modules: dict[str, nn.Module], blocks: list[Block]) -> Roles:
    roles = Roles(alpha=_alpha(blocks, modules))
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


def _alpha(blocks: list[Block], modules: dict[str, nn.Module]) -> float:
    longest = run = 0
    for block in blocks:
        run = 0 if any(_weight(node, modules) for node in block.shortcut) else run + 1
        longest = max(longest, run)
    return min(ALPHA, math.sqrt(ADDED / max(longest, 1)))


def _any(part: list[fx.Node], node: fx.Node, modules: dict[str, nn.Module], kinds: Any, *, behind: bool = True) -> bool:
    place = part.index(node)
    others = part[place + 1 :] if behind else part[:place]
    return any(kind(other, modules) is not None for other in others for kind in kinds)


def _replace(trial: nn.Module, roles: Roles) -> dict[str, nn.Module]:
    """New modules in the copy, by name."""
    fresh: dict[str, nn.Module] = {}
    for name in roles.weights:
        fresh[name] = _standardized(trial.get_submodule(name))
    for name in (*roles.leaving, *roles.inner, *roles.entering, *roles.trunk):
        old: Any = trial.get_submodule(name)
        activation = getattr(old, "activation", None)
        if name in roles.inner:
            fresh[name] = nn.Identity() if activation is None else activation
        else:
            learned = name in roles.leaving
            fresh[name] = Scale(roles.alpha if learned else 1.0, learned, activation)
        device = next((t.device for t in (*old.parameters(), *old.buffers())), None)
        fresh[name].to(device).train(old.training)
    for name, module in fresh.items():
        parent, _, own = name.rpartition(".")
        setattr(trial.get_submodule(parent), own, module)
    return fresh


def _standardized(old: Any) -> nn.Module:
    """The layer with standardised weights, and with a bias, which the norm behind it made superfluous."""
    place = {"device": old.weight.device, "dtype": old.weight.dtype}
    if isinstance(old, nn.Linear):
        new: Any = ScaledWSLinear(old.in_features, old.out_features, bias=True, **place)
    else:
        names = (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "padding_mode",
        )
        new = STANDARDIZED[type(old)](**{name: getattr(old, name) for name in names}, bias=True, **place)
    with torch.no_grad():
        new.weight.copy_(old.weight)
        new.bias.zero_()
    return new.train(old.training)


@torch.no_grad()
def _calibrate(trial: nn.Module, graph: fx.Graph, roles: Roles, fresh: dict[str, Any], run: Run) -> None:
    """Gains, one layer after the other as they run; and the numbers of the trunk, from its start."""
    numbers = {name: (fresh[name].gain, roles.alpha if name in roles.last else 1.0) for name in roles.weights}
    numbers |= {name: (fresh[name].scale, 1.0) for name in roles.entering}
    for _ in range(ROUNDS):
        for name, node in roles.trunk.items():
            fresh[name].scale /= _deviations(trial, graph, run, numbers)[node]
    _deviations(trial, graph, run, numbers)


class _Observer(fx.Interpreter):
    """Runs a graph, writes down the deviation of what every node gives, and brings some to the one they shall have.

    These are modules with a number that their output is proportional to.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph, numbers: dict[str, tuple[Tensor, float]]) -> None:
        super().__init__(module, graph=graph)
        self.numbers = numbers
        self.deviations: dict[fx.Node, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        y = super().run_node(n)
        if isinstance(y, Tensor) and y.is_floating_point() and y.numel() > 1:
            deviation = y.std().item()
            if n.op == "call_module" and n.target in self.numbers and deviation > 0:
                number, wanted = self.numbers[n.target]
                number *= wanted / deviation
                y, deviation = y * (wanted / deviation), wanted
            self.deviations[n] = deviation
        return y


@torch.no_grad()
def _deviations(
    trial: nn.Module, graph: fx.Graph, run: Run, numbers: dict[str, tuple[Tensor, float]]
) -> dict[fx.Node, float]:
    """Of what every node gives in one pass in evaluation, in which the numbers are corrected."""
    observer = _Observer(trial, graph, numbers)
    signature = inspect.signature(trial.forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        return observer.run(*given.args)

    modes = {module: module.training for module in trial.modules()}
    trial.forward = forward  # type: ignore[method-assign]
    try:
        run(trial.eval())
    finally:
        del trial.forward
        for module, training in modes.items():
            module.training = training
    return observer.deviations


def _check(intended: Plan, trial: nn.Module, graph: fx.Graph, blocks: list[Block], run: Run) -> None:
    """The variance behind every block, on data that nothing was measured on."""
    deviations = _deviations(trial, graph, run, {})
    variances = {_name(block): deviations[block.end] ** 2 for block in blocks}
    intended.readings += [Reading("variance", variance, name, unit="") for name, variance in variances.items()]
    least, most = min(variances.values()), max(variances.values())
    if not (least >= LEAST and most <= MOST):
        worst = max(variances, key=lambda name: abs(math.log(max(variances[name], 1e-30))))
        raise ValueError(
            f'convert_(to="normalizer-free"): behind {worst} the variance is {variances[worst]:.3g}, outside of '
            f"[{LEAST:g}, {MOST:g}].\n  nothing was changed; give more samples in match=, drawn as those it will see"
        )
    intended.notes.append(
        f"variance behind the {len(variances)} blocks, on data not measured on: {least:.2g} to {most:.2g}"
    )


def _name(block: Block) -> str:
    """What the modules of a branch have in common, or the name of the first."""
    names = [str(node.target) for node in block.branch if node.op == "call_module"]
    parents = {name.rpartition(".")[0] for name in names}
    return parents.pop() if len(parents) == 1 else names[0]


def _add_steps(intended: Plan, roles: Roles, fresh: dict[str, nn.Module]) -> None:
    for name, prescription in _prescriptions(intended.model, roles, fresh):
        edit = Become(intended.model.get_submodule(name), fresh[name])
        intended.add(prescription, edit)
        same = [n for n, m in intended.model.named_modules(remove_duplicate=False) if m is edit.layer]
        for known in same:
            intended.changes |= edit.changes(known)


def _prescriptions(model: nn.Module, roles: Roles, fresh: dict[str, Any]) -> Iterator[tuple[str, Prescription]]:
    gone = "no norm, no statistics"
    for name in roles.weights:
        old = type(model.get_submodule(name)).__name__
        detail = f"gain {fresh[name].gain[0].item():.3g}"
        yield name, Prescription(f"{old} standardises its weights", name, gone, "retrain", detail)
    for name in (*roles.leaving, *roles.entering, *roles.trunk, *roles.inner):
        old, new = type(model.get_submodule(name)).__name__, fresh[name]
        if name in roles.inner:
            yield name, Prescription(f"{old} is left out", name, gone, "retrain", "the gains make up for it")
        else:
            kind = "one learned number" if name in roles.leaving else "one number"
            detail = f"{new.scale.item():.3g}"
            yield name, Prescription(f"{old} becomes {kind}", name, gone, "retrain", detail)
