"""The graph of one module's own forward, with its children as single calls; or the reason why there is none.

torch.fx runs the forward with stand-ins and writes down what happens to them. Whatever depends on anything else (a
mode, an attribute, a random number, the type of a value) would be frozen into the graph in silence. This tracer
notices: what it can name becomes a condition of the graph, everything else is a refusal.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
_IN_PLACE = [name for name in dir(operator) if name.startswith("i") and hasattr(operator, f"__{name[1:]}__")]
Fact = tuple[str, str, Any]  # the module's name below the root, its attribute, the value that the graph relies on


class Refused(Exception):
    """Why there is no graph, as a clause with the module for its subject."""


@dataclass(frozen=True)
class Traced:
    """A graph, and what must hold when it runs in the place of the forward."""

    graph: fx.Graph
    parameters: tuple[str, ...]
    """Of the forward, in order."""
    fixed: dict[str, Any]
    """Those that have this value; all others are tensors."""
    facts: tuple[Fact, ...]
    inlined: tuple[str, ...]
    """Children that were taken apart."""


def trace(
    root: nn.Module,
    *,
    inline: frozenset[str] = frozenset(),
    given: Mapping[str, Any] | None = None,
    training: bool | None = None,
) -> Traced:
    """Write down the forward of ``root``.

    Args:
        root: its class's forward is traced.
        inline: names of children to take apart; all others are single calls.
        given: what parameters of the forward get: ``torch.Tensor``, or a value. A parameter that is missing has its
            default, and one that has none is a tensor.
        training: the mode that the graph is for, which ``root`` has now; ``None``: it must hold in both.

    Raises:
        Refused: the forward does something that a graph does not hold.
    """
    parameters, fixed = _parameters(root, given)
    traces = []
    for grad in (True, False):  # what differs between the two depends on the grad mode
        with torch.set_grad_enabled(grad), _untouched_random_state(), _watched(root, training is not None) as facts:
            tracer = _Tracer(fixed, inline)
            try:
                graph = tracer.trace(root)
            except Refused:
                raise
            except Exception as error:  # whatever a forward raises when it is given stand-ins
                first = (str(error) or type(error).__name__).splitlines()[0]
                raise Refused(f"cannot be traced: {first}") from error
            finally:
                constants = [name for name in vars(root) if name.startswith("_tensor_constant")]
                for name in constants:
                    delattr(root, name)
            if constants:
                raise Refused("makes tensors of its own, which a graph would hold as constants")
            traces.append((graph, facts))
    (graph, facts), (other, _) = traces
    if str(graph) != str(other):
        raise Refused("does something else without gradients")
    return Traced(graph, parameters, fixed, tuple(dict.fromkeys(facts)), tuple(sorted(inline)))


def _parameters(root: nn.Module, given: Mapping[str, Any] | None) -> tuple[tuple[str, ...], dict[str, Any]]:
    """All parameters of the forward, and the values of those that are taken for no tensor."""
    signature = list(inspect.signature(type(root).forward).parameters.items())[1:]
    fixed = {}
    for name, parameter in signature:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise Refused(f"takes any number of arguments ({parameter})")
        value = Tensor if parameter.default is parameter.empty else parameter.default
        if given is not None:
            value = given.get(name, value)
        if isinstance(value, _PLAIN):
            fixed[name] = value
        elif value is not Tensor:
            raise Refused(f"is given a {type(value).__name__} as {name}, which is neither a tensor nor plain")
    return tuple(name for name, _ in signature), fixed


class _Proxy(fx.Proxy):
    """Writes ``a += b`` down as what it is, and is asked for its type by nobody without a refusal."""

    @property
    def __class__(self) -> Any:
        asking = sys._getframe(1).f_globals.get("__name__", "")
        if asking.partition(".")[0] in ("torch", "normkit"):
            return _Proxy
        if self.node.op == "placeholder":
            return Tensor  # the graph runs for tensors only
        raise Refused(f"asks for the type of an intermediate value ({self.node})")

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise TypeError("a stand-in keeps its class")


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in _IN_PLACE:
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    def __init__(self, fixed: dict[str, Any], inline: frozenset[str]) -> None:
        super().__init__()
        self.fixed = fixed
        self.inline = inline
        self._surroundings = _surroundings()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.inline

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Stand-ins for the tensors, the values themselves for all others."""
        names = list(inspect.signature(root_fn).parameters)[1:]
        tensors = {n: self.create_proxy("placeholder", n, (), {}) for n in names if n not in self.fixed}
        return lambda root: root_fn(root, **tensors, **self.fixed), [self.root]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if kind not in ("placeholder", "output"):
            if _surroundings() != self._surroundings:
                raise Refused("switches the grad mode or autocast inside")
            frame: Any = sys._getframe()
            while frame is not None:
                if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
                    raise Refused("checkpoints activations inside")
                frame = frame.f_back
        return super().create_node(kind, *args, **kwargs)

    def iter(self, obj: fx.Proxy) -> Any:
        raise Refused(f"unpacks a value whose length is not known ({obj.node})")

    def to_bool(self, obj: fx.Proxy) -> bool:
        raise Refused(f"branches on a value ({obj.node})")


def _surroundings() -> tuple[Any, ...]:
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


@contextlib.contextmanager
def _untouched_random_state() -> Iterator[None]:
    before = torch.get_rng_state(), random.getstate()
    try:
        yield
        if not torch.equal(before[0], torch.get_rng_state()) or before[1] != random.getstate():
            raise Refused("draws random numbers")
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])


@contextlib.contextmanager
def _watched(root: nn.Module, one_mode: bool) -> Iterator[list[Fact]]:
    """Collects the plain attributes that the forward reads on ``root`` and below, and refuses what it writes."""
    names = {id(module): name for name, module in root.named_modules()}
    facts: list[Fact] = []

    def read(module: nn.Module, attribute: str) -> Any:
        value = object.__getattribute__(module, attribute)
        if id(module) not in names or attribute in _OF_EVERY_MODULE or _asked_by_torch():
            return value
        if attribute == "training" and not one_mode:
            where = names[id(module)]
            raise Refused(f"depends on self.{where}{'.' if where else ''}training, and a graph would freeze the mode")
        if isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(isinstance(item, _PLAIN) for item in value)):
            facts.append((names[id(module)], attribute, value))
        elif attribute in object.__getattribute__(module, "__dict__") and not isinstance(value, nn.Module | Tensor):
            if not callable(value):
                raise Refused(f"reads self.{attribute}, whose contents a graph would freeze")
            facts.append((names[id(module)], attribute, value))
        return value

    def write(module: nn.Module, attribute: str, value: Any) -> None:
        if id(module) in names and not attribute.startswith("_tensor_constant"):
            raise Refused(f"writes self.{attribute}")
        original(module, attribute, value)

    original = nn.Module.__setattr__
    nn.Module.__getattribute__ = read  # type: ignore[assignment, method-assign]
    nn.Module.__setattr__ = write  # type: ignore[assignment, method-assign]
    try:
        yield facts
    finally:
        nn.Module.__setattr__ = original  # type: ignore[method-assign]
        del nn.Module.__getattribute__


def _asked_by_torch() -> bool:
    """Whether the code that reads the attribute is torch's (or normkit's): it reads for bookkeeping."""
    return sys._getframe(2).f_globals.get("__name__", "").partition(".")[0] in ("torch", "normkit")
