"""The shorter way through a module's forward, and the conditions under which it is taken.

It stands on the object as ``forward``; class, children, parameters and the forward of the class stay. Whenever a
condition does not hold (a hook has been registered since, an attribute has another value, an argument is no tensor)
and whenever somebody is tracing (torch.compile, torch.export, torch.fx), the forward of the class runs, as if there
were no shortcut.
"""

from __future__ import annotations

import inspect
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from normkit.norm import Norm
from normkit.surgery.trace import Fact


@dataclass(frozen=True)
class Program:
    """Generated code and what must hold when it runs. Plain data: it pickles."""

    source: str
    names: dict[str, Any]
    """What the source refers to; an imported module stands as its name."""
    parameters: tuple[str, ...]
    """Of the forward, in order."""
    fixed: dict[str, Any]
    """Those that must have this value; all others must be tensors."""
    facts: tuple[Fact, ...]
    norms: tuple[str, ...]
    """Layers that the program applies in its own way: normkit's, without an activation of their own or hooks."""
    inlined: tuple[tuple[str, type], ...]
    """Children that the program takes apart: of this class, without hooks."""
    counts: tuple[tuple[str, int], ...]
    """How many children a container had, which a loop in the forward went over."""


def program(graph: fx.Graph, **conditions: Any) -> Program:
    """The code of a graph."""
    code = graph.python_code("self")
    importable = lambda value: _Import(value.__name__) if inspect.ismodule(value) else value
    return Program(code.src, {name: importable(value) for name, value in code.globals.items()}, **conditions)


@dataclass(frozen=True)
class _Import:
    name: str


@dataclass
class Shortcut:
    """Callable in the place of a bound forward."""

    owner: weakref.ref[nn.Module]
    """Weak: a strong one would keep a deleted model in memory until the garbage collector comes by."""
    program: Program
    run: Callable[..., Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        p = self.program
        names = {k: __import__(v.name, fromlist=["_"]) if isinstance(v, _Import) else v for k, v in p.names.items()}
        exec(compile(p.source, f"<normkit shortcut of {type(self.owner()).__qualname__}>", "exec"), names)
        self.run = cast("Callable[..., Any]", names["forward"])
        defaults = inspect.signature(type(self.owner()).forward).parameters  # type: ignore[union-attr]
        self._expected = [(name, defaults[name].default) for name in p.parameters]
        self._facts = [(_getter(name), attribute, value) for name, attribute, value in p.facts]
        self._norms = [attrgetter(name) for name in p.norms]
        self._inlined = [(attrgetter(name), kind) for name, kind in p.inlined]
        self._counts = [(_getter(name), count) for name, count in p.counts]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner = self.owner()
        if owner is None:
            raise RuntimeError("this forward belongs to a module that no longer exists; call the module instead")
        if not torch.compiler.is_compiling() and (tensors := self._tensors(args, kwargs)) and self.holds(owner):
            return self.run(owner, *tensors)
        return type(owner).forward(owner, *args, **kwargs)

    def _tensors(self, args: tuple, kwargs: dict[str, Any]) -> list[Tensor] | None:
        """The tensors in order; ``None`` where the arguments are not those that the program was written for."""
        p = self.program
        if len(args) > len(p.parameters):
            return None
        given = dict(zip(p.parameters, args, strict=False))
        if kwargs:
            given |= kwargs
        if torch._C._get_tracing_state() is not None:
            return None
        tensors = []
        for name, default in self._expected:
            value = given.pop(name, default)
            if name not in p.fixed:
                if not isinstance(value, Tensor):
                    return None
                tensors.append(value)
            elif not _same(value, p.fixed[name]):
                return None
        return None if given else tensors

    def holds(self, owner: nn.Module) -> bool:
        """Whether the program computes what the forward of the class would."""
        if _has_any_global_hook():
            return False
        for getter in self._norms:
            norm = cast("Any", getter(owner))
            if not isinstance(norm, Norm) or norm.activation is not None or has_hooks(norm) or "forward" in vars(norm):
                return False
        for getter, kind in self._inlined:
            child = cast("nn.Module", getter(owner))
            if type(child) is not kind or has_hooks(child) or type(vars(child).get("forward", self)) is not Shortcut:
                return False
        return all(_same(getattr(getter(owner), name, None), value) for getter, name, value in self._facts) and all(
            len(getter(owner)._modules) == count for getter, count in self._counts
        )

    @property
    def __signature__(self) -> inspect.Signature:
        """Of the forward of the class: trainers choose the columns of a data set by it."""
        owner: Any = self.owner()
        return inspect.signature(types.MethodType(type(owner).forward, owner))

    @property
    def __code__(self) -> types.CodeType:
        """Of the forward of the class: torch.export says by it where a program comes from."""
        return inspect.unwrap(type(self.owner()).forward).__code__  # type: ignore[union-attr]

    def __reduce__(self) -> tuple[Any, ...]:
        return _attach, (self.owner(), self.program)

    def __deepcopy__(self, memo: dict[int, Any]) -> Shortcut:
        owner: Any = self.owner()
        return _attach(memo.get(id(owner), owner), self.program)


def _attach(owner: nn.Module, program: Program) -> Shortcut:
    return Shortcut(weakref.ref(owner), program)


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and a == b)


def _getter(name: str) -> Callable[[nn.Module], Any]:
    return attrgetter(name) if name else lambda owner: owner


@dataclass
class Shorten:
    """Put a shortcut on a module. An edit of :mod:`normkit.surgery.operate`."""

    module: nn.Module
    program: Program

    def apply(self) -> None:
        vars(self.module)["forward"] = _attach(self.module, self.program)

    def objections(self) -> list[str]:
        ours = getattr(vars(self.module).get("forward"), "program", None) is self.program
        return [] if ours else ["its forward has been replaced since"]

    def revert(self) -> None:
        vars(self.module).pop("forward", None)
