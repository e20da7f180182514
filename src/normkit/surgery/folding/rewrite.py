"""A module's forward without its norm, for a norm that is no layer of its own: a function, or a norm with a skip."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from normkit import functional
from normkit.surgery.trace import Refused, Traced, trace

_FUNCTIONS = (F.batch_norm, torch.batch_norm, functional.batch_norm, F.instance_norm, functional.instance_norm)
_NAMES = ("running_mean", "running_var", "weight", "bias")


def without(owner: nn.Module, constants: list[Tensor], skip: bool, given: Mapping[str, Any] | None) -> nn.Module:
    """A module with the children and the forward of ``owner``, but for the norm that is made of ``constants``.

    Args:
        owner: in evaluation; it stays as it is.
        constants: weight, bias and statistics of the norm: those are gone.
        skip: the norm's input, times something, is added to its output; that goes as well.
        given: see :func:`normkit.surgery.trace.trace`.

    Raises:
        Refused: the forward cannot be written down without it.
    """
    traced = _traced(owner, given)
    graph, wanted = traced.graph, {id(tensor) for tensor in constants}
    norms = [node for node in graph.nodes if _made_of(owner, node) & wanted]
    if not norms:
        raise Refused("applies the norm in a way that is not seen in its own code")
    for node in norms:
        x, last = node.args[0], _addition(node) if skip else node
        if last is None:
            raise Refused("adds what goes around the norm in a way that is not seen in its own code")
        last.replace_all_uses_with(x)
        while last.op != "placeholder" and not last.users and last is not x:  # the addition, then what led to it
            inputs = [source for source in last.all_input_nodes if source is not x]
            graph.erase_node(last)
            last = next((source for source in inputs if not source.users), x)
    _take_all_parameters(graph, traced.parameters, traced.fixed)
    graph._tracer_cls = None  # a copy and a pickle trace the code again, by fx's own tracer
    module = fx.GraphModule(owner, graph, class_name=type(owner).__name__)
    module.graph.eliminate_dead_code()
    module.recompile()
    gone = {f"{name}." for name, child in owner.named_children() if _tensors(child) and _tensors(child) <= wanted}
    for store in ("_parameters", "_buffers", "_modules"):  # fx keeps what the graph names; the rest is kept here
        ours = vars(owner)[store]
        kept = {name: value for name, value in ours.items() if id(value) not in wanted and f"{name}." not in gone}
        vars(module)[store] = {name: value for name, value in kept.items() if not _counter(owner, name, wanted)}
    module.train(owner.training)
    return module


def _traced(owner: nn.Module, given: Mapping[str, Any] | None) -> Traced:
    """The forward of ``owner``, without torch's question how many axes there are: it has been answered."""
    asks = isinstance(owner, nn.modules.batchnorm._NormBase) and "_check_input_dim" not in vars(owner)
    if asks:
        vars(owner)["_check_input_dim"] = lambda x: None
    try:
        return trace(owner, given=given, training=False)
    finally:
        if asks:
            del vars(owner)["_check_input_dim"]


def _made_of(owner: nn.Module, node: fx.Node) -> set[int]:
    """The tensors that a norm is made of, if the node applies one."""
    if node.op == "call_module":
        module = owner.get_submodule(str(node.target))
        return _tensors(module) if isinstance(module, nn.modules.batchnorm._NormBase) else set()
    if node.op != "call_function" or node.target not in _FUNCTIONS:
        return set()
    reads = [source for source in node.all_input_nodes if source.op == "get_attr"]
    return {id(_attribute(owner, str(source.target))) for source in reads}


def _tensors(module: nn.Module) -> set[int]:
    named = (getattr(module, name, None) for name in _NAMES)
    return {id(tensor) for tensor in named if isinstance(tensor, Tensor)}


def _counter(owner: nn.Module, name: str, wanted: set[int]) -> bool:
    """Whether a buffer counts the batches of the norm that is gone, and nothing else."""
    return name.startswith("num_batches") and bool(_tensors(owner) & wanted)


def _attribute(owner: nn.Module, target: str) -> Any:
    path, _, name = target.rpartition(".")
    return getattr(owner.get_submodule(path), name)


def _addition(norm: fx.Node) -> fx.Node | None:
    readers = list(norm.users)
    found = len(readers) == 1 and len(readers[0].all_input_nodes) in (1, 2) and "add" in str(readers[0].target)
    return readers[0] if found else None


def _take_all_parameters(graph: fx.Graph, parameters: tuple[str, ...], fixed: Mapping[str, Any]) -> None:
    """Every parameter of the forward again, in its order: those with one value stay in the signature, unused."""
    inputs = {str(node.target): node for node in graph.nodes if node.op == "placeholder"}
    first = next(iter(graph.nodes))
    for name in parameters:
        if name in inputs:
            first.prepend(inputs[name]) if inputs[name] is not first else None
            first = inputs[name].next
        else:
            with graph.inserting_before(first):
                graph.placeholder(name, default_value=fixed[name])
