"""An optimizer follows a model whose parameters have changed: new ones join a group, those that are gone leave it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn, optim

from normkit.surgery.become import Become
from normkit.surgery.operate import Plan
from normkit.vocabulary.prescription import Prescription


@dataclass(frozen=True)
class New:
    """A parameter that the optimizer does not know yet."""

    name: str
    parameter: nn.Parameter
    beside: tuple[nn.Parameter, ...] = ()
    """Those of its layer: it joins the group of the first that is in one."""


@dataclass
class Regroup:
    """Take parameters out of an optimizer and put others in. An edit of :mod:`normkit.surgery.operate`.

    The state (momentum ...) of all others stays where it is, since they are the same objects.
    """

    optimizer: optim.Optimizer
    removed: list[nn.Parameter]
    added: list[New]
    before: list[dict[str, Any]] = field(init=False, default_factory=list)
    state: dict[Tensor, Any] = field(init=False, default_factory=dict)
    after: list[list[int]] = field(init=False, default_factory=list)

    def apply(self) -> None:
        groups = self.optimizer.param_groups
        self.before = [{key: list(group[key]) for key in ("params", "param_names") if key in group} for group in groups]
        homes = [self._home(new) for new in self.added]
        gone = {id(parameter) for parameter in self.removed}
        for group in groups:
            keep = [place for place, parameter in enumerate(group["params"]) if id(parameter) not in gone]
            for key in self.before[0]:
                group[key][:] = [group[key][place] for place in keep]
        for new, home in zip(self.added, homes, strict=True):
            home["params"].append(new.parameter)
            if "param_names" in home:
                home["param_names"].append(new.name)
        self.state = {p: self.optimizer.state.pop(p) for p in self.removed if p in self.optimizer.state}
        self.after = self._now()

    def _home(self, new: New) -> dict[str, Any]:
        for beside in new.beside:
            for group in self.optimizer.param_groups:
                if any(parameter is beside for parameter in group["params"]):
                    return group
        return self.optimizer.param_groups[0]

    def _now(self) -> list[list[int]]:
        return [[id(parameter) for parameter in group["params"]] for group in self.optimizer.param_groups]

    def objections(self) -> list[str]:
        return [] if self._now() == self.after else ["the optimizer's groups have been changed since"]

    def revert(self) -> None:
        for group, lists in zip(self.optimizer.param_groups, self.before, strict=True):
            for key, values in lists.items():
                group[key][:] = values
        for new in self.added:
            self.optimizer.state.pop(new.parameter, None)
        self.optimizer.state.update(self.state)


def follow(intended: Plan, optimizer: optim.Optimizer | None) -> None:
    """Let the optimizer follow the layers that become others, where parameters come or go."""
    steps = [(s.prescription.module, s.edit) for s in intended.steps if isinstance(s.edit, Become)]
    edits = [edit for _, edit in steps]
    had = {id(p) for edit in edits for p in edit.layer.parameters()}
    come = [(name, own, p, edit) for name, edit in steps for own, p in edit.added().items()]
    stay = {id(p) for module in _outside(intended.model, {e.layer for e in edits}) for p in module.parameters(False)}
    stay |= {id(p) for edit in edits for p in edit.adopted("_parameters").values()}
    stay |= {id(p) for _, _, p, _ in come}  # under another name, if it was there
    removed = [p for edit in edits for p in edit.removed().values() if id(p) not in stay]
    added = [
        New(f"{name}.{own}".lstrip("."), parameter, tuple(edit.layer.parameters()))
        for name, own, parameter, edit in come
        if id(parameter) not in had
    ]
    if not removed and not added:
        return
    words = f"{len(added)} parameters join, {len(removed)} leave"
    if optimizer is not None:
        prescription = Prescription("optimizer follows", "", "it trains what there is", detail=words)
        intended.add(prescription, Regroup(optimizer, removed, added))
    elif added:
        intended.notes.append(f"{words}: give optimizer=, or make the optimizer afterwards")


def _outside(module: nn.Module, layers: Collection[nn.Module]) -> Iterator[nn.Module]:
    """The module and all below it, but for these layers and what is below them."""
    if module not in layers:
        yield module
        for child in module.children():
            yield from _outside(child, layers)
