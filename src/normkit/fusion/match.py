"""Finds the patterns of a graph, and says of every place that looks like one why it is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import nn
from torch.fx import Graph, Node

from normkit.fusion.activations import Activation, added_to, of_function, of_module
from normkit.fusion.effects import Effects


class Host(Protocol):
    """What whoever owns a graph knows about it."""

    def module_of(self, target: str) -> nn.Module:
        """The module that a ``call_module`` node calls."""

    def is_norm(self, node: Node) -> bool:
        """Whether the node applies a norm that can be written as one of normkit's, with nothing fused to it yet."""

    def may_add(self, norm: Node, residual: Node) -> bool:
        """False: known not to be tensors of one shape and type. True where it is known, or checked when it runs."""

    def against(self, node: Node) -> str | None:
        """Why a node must stay the call that it is (hooks, for example), as a clause; ``None``: it need not."""


@dataclass
class Pattern:
    """One application of a norm and what it takes in."""

    norm: Node
    addition: Node | None = None
    called: Node | None = None
    """The node of the activation."""
    activation: Activation | None = None

    @property
    def residual(self) -> Node | None:
        """The other summand, as the graph has it now: what was found may have been rewritten since."""
        return None if self.addition is None else added_to(self.norm, self.addition)[0]  # type: ignore[index]

    @property
    def in_place(self) -> bool:
        """Whether the addition was written as one that changes the norm's output."""
        return self.addition is not None and added_to(self.norm, self.addition)[1]  # type: ignore[index]

    @property
    def last(self) -> Node:
        return self.called or self.addition or self.norm

    @property
    def words(self) -> str:
        parts = ["the residual addition"] if self.addition is not None else []
        parts += [self.activation.words] if self.activation is not None else []
        return " and ".join(parts)


@dataclass(frozen=True)
class Refusal:
    """A place where an addition or an activation follows a norm and stays a step of its own."""

    node: Node
    reason: str


def find(graph: Graph, host: Host) -> tuple[list[Pattern], list[Refusal]]:
    """All norms of a graph, each with what can be fused to it."""
    effects = Effects(graph, host.module_of)
    patterns, refusals = [], []
    taken: set[Node] = set()  # an addition of two norms belongs to the first of them
    for node in graph.nodes:
        if not host.is_norm(node):
            continue
        pattern = Pattern(node)
        for extend in (_extend_by_addition, _extend_by_activation):
            reason = extend(pattern, host, taken)
            reason = reason or _reason_against_moving(pattern, host, effects)
            if reason is not None:
                _cut(pattern)
                refusals.append(Refusal(node, reason))
                break
        taken |= {part for part in (pattern.addition, pattern.called) if part is not None}
        patterns.append(pattern)
    return patterns, refusals


def follows(node: Node, host: Host) -> bool:
    """Whether something that a norm could take in follows the node, whatever the node is."""
    return any(added_to(node, user) or _activation(user, host) for user in node.users)


def _activation(node: Node, host: Host) -> Activation | None:
    if node.op == "call_module":
        return of_module(host.module_of(str(node.target)), str(node.target))
    return of_function(node) if node.op in ("call_function", "call_method") else None


def _extend_by_addition(pattern: Pattern, host: Host, taken: set[Node]) -> str | None:
    """Take the addition in if there is one; a reason if there is one that must stay."""
    norm = pattern.norm
    for user in norm.users:
        if user in taken or (found := added_to(norm, user)) is None:
            continue
        residual, in_place = found
        if not host.may_add(norm, residual):
            return None
        if in_place and user.args[0] is not norm:
            return f"{residual} is changed in place by the addition: write {residual} + {norm} instead of +="
        if reason := _second_reader(norm, user) or host.against(norm):
            return reason
        pattern.addition = user
        return None
    return None


def _extend_by_activation(pattern: Pattern, host: Host, taken: set[Node]) -> str | None:
    before = pattern.last
    for user in before.users:
        if user in taken or not user.args or user.args[0] is not before:
            continue
        if (activation := _activation(user, host)) is None:
            continue
        if reason := _second_reader(before, user) or host.against(pattern.norm) or host.against(user):
            return reason
        pattern.called, pattern.activation = user, activation
        return None
    return None


def _second_reader(node: Node, reader: Node) -> str | None:
    others = [str(user) for user in node.users if user is not reader]
    return f"the value before {reader} has a second reader ({', '.join(others)})" if others else None


def _reason_against_moving(pattern: Pattern, host: Host, effects: Effects) -> str | None:
    """The fused call stands where the pattern ends: nothing on the way may change what it reads, or norm the same."""
    norm, last = pattern.norm, pattern.last
    if last is norm:
        return None
    if writer := effects.writes_between(norm, last, norm.all_input_nodes):
        return f"the input of the norm is changed in place by {writer} before the norm could be applied"
    if pattern.addition is not None and last is not pattern.addition:
        residual = [node for node in pattern.addition.all_input_nodes if node is not norm]
        if writer := effects.writes_between(pattern.addition, last, residual):
            return f"the residual is changed in place by {writer} before the activation"
    statistics = effects.may_write(norm)
    if norm.op == "call_module":
        statistics = [node for node in norm.graph.nodes if str(node.target).startswith(f"{norm.target}.")]
    if reader := effects.reads_between(norm, last, statistics):
        return f"the running statistics are read by {reader} before the norm could be applied"
    if norm.op != "call_module":
        return None
    module = host.module_of(str(norm.target))
    node = norm.next
    while node is not last:
        if node.op == "call_module" and any(part is module for part in host.module_of(str(node.target)).modules()):
            return f"the same norm is applied again by {node} on the way"
        node = node.next
    return None


def _cut(pattern: Pattern) -> None:
    """Give back the step that was taken in last and turned out to be in the way."""
    if pattern.called is not None:
        pattern.called = pattern.activation = None
    elif pattern.addition is not None:
        pattern.addition = None
