"""Listening: what a training loop tells by itself, through hooks on the optimizer and on the whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from normkit.stepping import takes_its_step


class Listener(Protocol):
    """Who is told."""

    def forward_begins(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None: ...
    def backward_ends(self) -> None: ...
    def before_update(self) -> None: ...
    def after_update(self) -> None: ...


class Hooks:
    """Hooks around the optimizer's step and before the model's forward, until :meth:`remove`.

    No layer gets a hook, and compiled code none at all: a compiled model is listened to from outside of what is
    compiled, so that nothing is compiled anew.

    Args:
        model: what the loop calls: the model, its compiled form, or DistributedDataParallel around it.
        optimizer: a torch optimizer, or a wrapper that has one as ``.optimizer``.
        weight: one parameter, by whose gradients backward passes are told.
    """

    def __init__(self, model: nn.Module, optimizer: Any, listener: Listener, weight: Tensor | None = None) -> None:
        self.model, self.listener = model, listener
        self._steps = True
        own = torch_optimizer(optimizer)
        self._handles: list[Any] = [
            own.register_step_pre_hook(self._before),
            own.register_step_post_hook(self._after),
            model.register_forward_pre_hook(Ear(listener), with_kwargs=True),
        ]
        if weight is not None:
            self._handles.append(weight.register_post_accumulate_grad_hook(lambda _: listener.backward_ends()))
        self._compiled = model._compiled_call_impl
        if self._compiled is not None:
            self._wrapper = self._outside(self._compiled)
            model._compiled_call_impl = self._wrapper

    def remove(self) -> None:
        """Leave no trace."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._compiled is not None and self.model._compiled_call_impl is self._wrapper:
            self.model._compiled_call_impl = self._compiled

    def _before(self, optimizer: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """With a closure, the gradients come with it: it is behind the closure that the update begins."""
        self._steps = takes_its_step(optimizer)
        if not self._steps:
            return None
        closure = kwargs.get("closure", next(iter(args[1:]), None))
        if not callable(closure):
            self.listener.before_update()
            return None
        first = [True]

        def then() -> Any:
            result = closure()
            if first.pop() if first else False:
                self.listener.before_update()
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": then}
        return (args[0], then, *args[2:]), kwargs

    def _after(self, *_: Any) -> None:
        if self._steps:
            self.listener.after_update()

    def _outside(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.listener.forward_begins(self.model, args, kwargs)
            return compiled(*args, **kwargs)

        return call


class Ear:
    """The hook on the model. A copy of the model, or one that comes out of a file, has one that hears nothing."""

    def __init__(self, listener: Listener | None = None) -> None:
        self.listener = listener

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.listener is not None and not torch.compiler.is_compiling():
            self.listener.forward_begins(module, args, kwargs)

    def __deepcopy__(self, memo: dict) -> Ear:
        return Ear()

    def __reduce__(self) -> Any:
        return Ear, ()


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside wrappers.

    Raises:
        TypeError: there is none.
    """
    inner = optimizer
    while not hasattr(inner, "_optimizer_step_pre_hooks") or not isinstance(inner, torch.optim.Optimizer):
        if (further := getattr(inner, "optimizer", None)) is None:
            raise TypeError(
                f"watch: {type(optimizer).__name__} is no torch.optim.Optimizer and has none as .optimizer.\n"
                "  give the optimizer whose step() ends a training step"
            )
        inner = further
    while isinstance(further := getattr(inner, "optimizer", None), torch.optim.Optimizer):
        inner = further  # a wrapper that is an optimizer by name: what steps is inside
    return inner
