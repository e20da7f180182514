"""``nk.convert_(model, to="normalizer-free")``: a residual network keeps its variance without its norms.

What the norms did is done by the weights (standardised, with a gain that brings each layer's output to variance 1), by
one learned number per branch, and by one fixed number in the place of each norm of the trunk.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from normkit.blocks.residual import Scale
from normkit.blocks.weight_standardized import ScaledWSConv1d, ScaledWSConv2d, ScaledWSConv3d, ScaledWSLinear
from normkit.surgery.batches import Call
from normkit.surgery.become import Become
from normkit.surgery.fit import Run, two_runs
from normkit.surgery.operate import Plan
from normkit.surgery.residual_graph import Block, Roles, blocks_of, name_of, roles_of, traced
from normkit.vocabulary.prescription import Prescription
from normkit.vocabulary.reading import Reading

NAMES = ("normalizer-free", "normalizer_free", "nf")
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
    graph = traced(trial)
    modules = dict(trial.named_modules())
    blocks = blocks_of(graph, modules)
    roles = roles_of(graph, modules, blocks)
    runs = two_runs(match, call)
    fresh = _replace(trial, roles)
    _calibrate(trial, graph, roles, fresh, runs[0])
    intended = Plan("convert_", model)
    _check(intended, trial, graph, blocks, runs[1])
    _add_steps(intended, roles, fresh)
    return intended


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
        device = next((t.device for t in (*old.parameters(), *old.buffers(), *trial.parameters())), None)
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
    trial.forward = forward
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
    variances = {name_of(block): deviations[block.end] ** 2 for block in blocks}
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
