"""Flow: which module hands its output to which, read from the code of a model or from one forward pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from normkit.measure.sites import is_activation
from normkit.measure.structure import kind_of
from normkit.measure.untouched import untouched

_TRANSPARENT = (
    "view",
    "_unsafe_view",
    "reshape",
    "flatten",
    "clone",
    "contiguous",
    "_to_copy",
    "to",
    "detach",
    "alias",
)
"""Operators that hand on what they get."""


@dataclass
class Step:
    """One call of a layer, or of an operator between layers."""

    operator: str
    """The class of the layer, or the operator's name: add, relu, permute."""
    sources: tuple[int, ...]
    """Places in the flow of the steps whose outputs it takes, in the order of its arguments."""
    name: str = ""
    """Of the layer in the model."""
    module: nn.Module | None = field(default=None, repr=False)
    shape: tuple[int, ...] = ()
    """Of the first tensor that comes out, where the model was run."""


class Flow:
    """The steps of a forward pass in order."""

    def __init__(self, steps: list[Step]) -> None:
        self.steps = steps
        self.readers: dict[int, list[int]] = {place: [] for place in range(len(steps))}
        for place, step in enumerate(steps):
            for source in step.sources:
                self.readers[source].append(place)

    def of_norms(self, *kinds: str) -> Iterator[tuple[int, Step]]:
        """Steps that call a norm (of these kinds)."""
        for place, step in enumerate(self.steps):
            if step.module is not None and (kind := kind_of(step.module)) and (not kinds or kind in kinds):
                yield place, step

    def before(self, place: int) -> int | None:
        """The step whose output a step takes, through views and copies; ``None``: an input of the model."""
        while sources := self.steps[place].sources:
            place = sources[0]
            if self.steps[place].operator not in _TRANSPARENT:
                return place
        return None

    def after(self, place: int) -> list[int]:
        """The steps that read an output, through views and copies."""
        found = []
        for reader in self.readers[place]:
            found += self.after(reader) if self.steps[reader].operator in _TRANSPARENT else [reader]
        return found


def is_layer(module: nn.Module) -> bool:
    """Whether a flow shows the module as one step, and not what happens in it."""
    if kind_of(module) or is_activation(module) or isinstance(module, nn.RNNBase):
        return True
    return type(module).__module__.startswith("torch.nn.") and next(module.children(), None) is None


def read_code(model: nn.Module) -> Flow | None:
    """The flow of a model whose code ``torch.fx`` can follow, without data; ``None``: it cannot."""
    try:
        with warnings.catch_warnings(action="ignore"), untouched(model):
            graph = _Tracer().trace(model)
    except Exception:  # whatever a model's code does with a stand-in for a tensor
        return None
    places = {node: place for place, node in enumerate(graph.nodes)}
    modules = dict(model.named_modules(remove_duplicate=False))
    steps = []
    for node in graph.nodes:
        sources = tuple(places[source] for source in node.all_input_nodes)
        called = node.op == "call_module"
        operator = type(modules[node.target]).__name__ if called else _word(node)
        steps.append(Step(operator, sources, node.target if called else "", modules[node.target] if called else None))
    return Flow(steps)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return is_layer(module)


def _word(node: fx.Node) -> str:
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op if node.op in ("placeholder", "get_attr", "output") else target.partition(".")[0].strip("_")


def read_pass(model: nn.Module, run: Callable[[], Any], seen: Callable[[str, str, tuple], None]) -> Flow:
    """The flow of one forward pass: ``run()`` runs the model.

    Args:
        model: at rest (:func:`~normkit.measure.untouched.untouched`).
        run: runs it.
        seen: called as ``seen(where, what, arguments)`` before every layer and every operator: the name of the layer,
            or of the innermost module that the operator is in; and the name of the operator, empty for a layer.
    """
    recorder = _Recorder(seen)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(recorder.entering(name), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(recorder.leaving(name), always_call=True).remove)
        stack.enter_context(recorder)
        run()
    return Flow(recorder.steps)


class _Recorder(TorchDispatchMode):
    """Writes down who made which tensor; inside a layer it does not look."""

    def __init__(self, seen: Callable[[str, str, tuple], None]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.seen = seen
        self.made_by = WeakTensorKeyDictionary()
        self.inside: list[str] = []
        self.layer: nn.Module | None = None
        self.taken: tuple[int, ...] = ()

    def entering(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self.inside.append(name)
            if self.layer is None and is_layer(module):
                self.taken = self._sources((args, kwargs))
                with torch.utils._python_dispatch._disable_current_modes():
                    self.seen(name, "", (module, *args, *kwargs.values()))
                self.layer = module

        return hook

    def leaving(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            self.inside.pop()
            if self.layer is module:
                self.layer = None
                self._note(Step(type(module).__name__, self.taken, name, module), output)

        return hook

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.layer is None:
            word = operator.overloadpacket.__name__
            self.seen(self.inside[-1] if self.inside else "", word, args)
            sources = self._sources((args, kwargs))
        output = operator(*args, **kwargs)
        if self.layer is None:
            self._note(Step(word.rstrip("_"), sources), output)
        return output

    def _sources(self, arguments: Any) -> tuple[int, ...]:
        tensors = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
        return tuple(dict.fromkeys(self.made_by[t] for t in tensors if t in self.made_by))

    def _note(self, step: Step, output: Any) -> None:
        tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        step.shape = tuple(tensors[0].shape) if tensors else ()
        self.steps.append(step)
        for tensor in tensors:
            self.made_by[tensor] = len(self.steps) - 1
