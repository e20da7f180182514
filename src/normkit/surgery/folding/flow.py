"""The flow of one forward: which operator read what another had made, and which parameters went in.

torch.export writes the probe run down in torch's own operators, nothing in place, every parameter by its name. What a
model's code looks like does not matter then: a functional norm, a layer that is used twice, a weight that is computed,
a value with a second reader are all seen for what they are. Where the whole model cannot be exported, its parts are.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import operator
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from normkit.surgery import probe

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


@dataclass(eq=False)
class Flow:
    """What one module did on the probe batch."""

    nodes: list[Node]
    names: dict[Node, str]
    """Parameter or buffer that came in -> its name in the model."""
    tensors: dict[str, Tensor]
    """All parameters and buffers of the model, by all their names."""
    prefix: str = ""
    """The module's name in the model, with a dot behind it; empty: the model itself."""
    _uses: dict[int, set[Node]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node, name in self.names.items():
            self._uses.setdefault(id(self.tensors[name]), set()).update(self.readers(node))

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def uses(self, name: str) -> set[Node]:
        """Everything that reads the tensor of this name, under whatever name."""
        return self._uses.get(id(self.tensors[name]), set())

    def foreign(self, name: str) -> str | None:
        """Another name of the tensor in a part of the model that this flow does not show."""
        tensor = self.tensors[name]
        others = (other for other, its in self.tensors.items() if its is tensor and not other.startswith(self.prefix))
        return next(others, None)

    def readers(self, node: Node) -> list[Node]:
        """The nodes that make something of a value. An assertion makes nothing."""
        return [user for user in node.users if "assert" not in str(user.target)]

    def owner(self, node: Node) -> str:
        """The innermost module in whose forward the node is, by its name in the model."""
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = str(stack[-1][0]).partition("@")[0] if stack else ""
        return f"{self.prefix}{path}".rstrip(".")

    def words(self, node: Node) -> str:
        """A node as a person would call it."""
        if node.op == "placeholder":
            return "an input"
        if node.target is operator.getitem:
            return self.words(node.all_input_nodes[0])
        word = str(node.target).removeprefix("aten.").partition(".")[0].strip("_") if node.op != "output" else "output"
        return f"{word} in {self.owner(node) or 'the model'}"


def shape(node: Node) -> tuple[int, ...]:
    """The shape of a node's value on the probe batch."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def observe(model: nn.Module, example_inputs: Any) -> tuple[list[Flow], dict[str, str]]:
    """The flow of the model on the probe batch, or those of its parts; and which part has none, with the reason.

    Raises:
        ValueError: the model does not take the probe batch.
    """
    probe.run(model, example_inputs, training=False)
    tensors = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    reasons: dict[str, str] = {}
    flows = list(_observe(model, model, "", probe.arguments(example_inputs), tensors, reasons))
    return flows, reasons


def _observe(
    model: nn.Module,
    module: nn.Module,
    name: str,
    call: tuple[tuple, dict[str, Any]],
    tensors: dict[str, Tensor],
    reasons: dict[str, str],
) -> Iterator[Flow]:
    prefix = f"{name}." if name else ""
    try:
        program = _exported(module, *call)
    except Exception as error:  # whatever a forward raises when it is exported
        reasons[name] = (str(error) or type(error).__name__).strip().splitlines()[0]
        parts = dict(_parts(module, prefix))
        for part, its_call in _calls(module, parts, call).items():
            yield from _observe(model, parts[part], part, its_call, tensors, reasons)
        return
    signature = program.graph_signature
    known = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    nodes = list(program.graph.nodes)
    names = {node: f"{prefix}{known[node.name]}" for node in nodes if node.op == "placeholder" and node.name in known}
    yield Flow(nodes, {node: its for node, its in names.items() if its in tensors}, tensors, prefix)


def _exported(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
    with torch.no_grad(), probe.restored(module), warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")  # they are about the model's code, and speak to whoever exports it
        program = torch.export.export(module, args, kwargs, strict=False)
        return program.run_decompositions({})  # nothing in place any more, and no operator taken apart


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    aside = io.StringIO()  # where the export fails, torch prints the graph so far
    try:
        with contextlib.redirect_stdout(aside), contextlib.redirect_stderr(aside):
            yield
    finally:
        logging.disable(before)


def _parts(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a forward calls: children, and those in lists."""
    for name, child in module.named_children():
        if isinstance(child, _CONTAINERS):
            yield from _parts(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _calls(module: nn.Module, parts: dict[str, nn.Module], call: tuple) -> dict[str, tuple[tuple, dict[str, Any]]]:
    """With what each part is called first when the module is."""
    names = {id(part): name for name, part in parts.items()}
    seen: dict[str, tuple[tuple, dict[str, Any]]] = {}

    def note(part: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if names[id(part)] not in seen:
            still = lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else copy.copy(leaf)
            seen[names[id(part)]] = pytree.tree_map(still, (args, kwargs))

    handles = [part.register_forward_pre_hook(note, with_kwargs=True) for part in parts.values()]
    try:
        with torch.no_grad(), probe.restored(module):
            module(*call[0], **call[1])
    finally:
        for handle in handles:
            handle.remove()
    return {name: seen[name] for name in parts if name in seen}
