"""Which norms of a flow go into which layers. All applications of a norm, and all uses of a layer, agree or nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.fx import Node

from normkit.surgery.folding import layers, path
from normkit.surgery.folding.layers import Use
from normkit.surgery.folding.sites import Site

Side = Literal["before", "behind"]


@dataclass(frozen=True, eq=False)
class Fold:
    """One norm, and the layers that take it in."""

    sites: tuple[Site, ...]
    """All applications of it."""
    side: Side
    """Where the layers are, as seen from the norm."""
    uses: tuple[tuple[Use, int], ...]
    """Each layer once, with how many of its inputs belong to one channel."""

    @property
    def site(self) -> Site:
        return self.sites[0]

    @property
    def layers(self) -> str:
        return ", ".join(dict.fromkeys(used.owner or "the model" for used, _ in self.uses))


def choose(model: nn.Module, sites: Iterable[Site]) -> tuple[list[Fold], dict[Site, str]]:
    """The folds in the order in which they are carried out, and of every other norm why it stays."""
    groups: dict[tuple, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.key, []).append(site)
    ahead: list[Fold] = []
    against: dict[Site, list[str]] = {}
    gone: dict[Node, Site] = {}
    for group in groups.values():
        found = _before(model, group, gone)
        if isinstance(found, Fold):
            ahead.append(found)
            gone |= {site.output: site for site in group}
        else:
            against[group[0]] = [found] if group[0].input is not None else []
    behind: list[Fold] = []
    gone = {}
    for first in reversed(list(against)):  # the last of two norms in a row goes first
        group = groups[first.key]
        found = _behind(model, group, gone)
        if isinstance(found, Fold):
            behind.append(found)
            del against[first]
            gone |= {node: site for site in group if site.input is not None for node in site.inside}
        else:
            against[first].append(found)
    return [*ahead, *behind], {site: _both(reasons) for site, reasons in against.items()}


def _both(reasons: list[str]) -> str:
    if len(reasons) == 1:
        return f"cannot go into the layers behind it: {reasons[0]}"
    return f"cannot go into the layer before it: {reasons[0]}; nor into those behind it: {reasons[1]}"


def _before(model: nn.Module, group: list[Site], gone: dict[Node, Site]) -> Fold | str:
    uses: dict[Node, Use] = {}
    for site in group:
        used = path.ahead(site, gone)
        if isinstance(used, str):
            return used
        if reason := layers.reason_against(model, used) or layers.reason_against_a_bias(model, used):
            return reason
        uses[used.node] = used
    return _shared(group, uses, {}) or Fold(tuple(group), "before", _once(group, uses, {}))


def _behind(model: nn.Module, group: list[Site], gone: dict[Node, Site]) -> Fold | str:
    uses: dict[Node, Use] = {}
    inner: dict[Node, int] = {}
    for site in group:
        found = path.behind(site, gone)
        if isinstance(found, str):
            return found
        for used, times in found:
            reason = layers.reason_against(model, used)
            if site.constants.shifts:
                reason = reason or layers.reason_against_a_bias(model, used)
            if reason:
                return reason
            uses[used.node], inner[used.node] = used, times
    return _shared(group, uses, inner) or Fold(tuple(group), "behind", _once(group, uses, inner))


def _once(group: list[Site], uses: dict[Node, Use], inner: dict[Node, int]) -> tuple[tuple[Use, int], ...]:
    """One use of each weight: a layer that is called twice is changed once."""
    by_weight = {id(group[0].flow.tensor(used.weight)): (used, inner.get(node, 1)) for node, used in uses.items()}
    return tuple(by_weight.values())


def _shared(group: list[Site], uses: dict[Node, Use], inner: dict[Node, int]) -> str | None:
    """What else reads a tensor that would change or go, as a clause."""
    flow, constants = group[0].flow, group[0].constants
    if any((site.constants.eps, site.constants.skip) != (constants.eps, constants.skip) for site in group):
        return "it is applied in two ways"
    applied = set().union(*(site.inside for site in group))
    for name in constants.names():
        if others := flow.uses(name) - applied:
            return f"{name} is also read by {flow.words(min(others, key=str))}"
        if other := flow.foreign(name):
            return f"{name} is also {other}"
    for used in uses.values():
        for name in [used.weight, *([used.bias] if used.bias else [])]:
            if others := flow.uses(name) - set(uses):
                return f"{name} is also used by {flow.words(min(others, key=str))}, where this norm is not"
            if other := flow.foreign(name):
                return f"{name} is also {other}, in a part of the model that could not be seen"
        twins = [other for other in uses if flow.tensor(uses[other].weight) is flow.tensor(used.weight)]
        if len({(inner.get(twin, 1), uses[twin].kind, uses[twin].bias) for twin in twins}) > 1:
            return f"{used.weight} is used in two ways"
        if any(other.bias == used.bias is not None and other.weight != used.weight for other in uses.values()):
            return f"{used.bias} belongs to several layers"
    return None
