"""Point: a model at its weights, where theory probes look at the loss, its gradient and the activations nearby."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normkit.measure.running import Call, Loss, runner
from normkit.measure.sites import activation_of, by_unit, carried_out, wide
from normkit.measure.untouched import copied, in_mode, original, untouched


class Point:
    """A model at its weights: the loss and the gradient there, and nearby."""

    def __init__(self, model: nn.Module, batch: Any, loss_fn: Loss, call: Call | None) -> None:
        self.model, self.batch, self.run = original(model), batch, runner(loss_fn, call)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.loss, self.gradient = self.evaluate(self.trained)

    def layers(self) -> Iterator[tuple[str, list[nn.Parameter]]]:
        """Name and parameters of each module that has some of its own; a shared one once."""
        seen: set[nn.Parameter] = set()
        for name, module in self.model.named_modules():
            own = [p for p in module.parameters(recurse=False) if p.requires_grad and p not in seen]
            seen.update(own)
            if own:
                yield name, own

    def evaluate(self, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, dict[nn.Parameter, Tensor]]:
        """The loss and its gradients at the present weights; a parameter without one has zeros."""
        with untouched(self.model), in_mode(self.model, None), torch.enable_grad():
            _, loss = self.run(self.model, copied(self.batch))
            assert loss is not None
            taken = torch.autograd.grad(loss, parameters, allow_unused=True)
        pairs = zip(parameters, taken, strict=True)
        return loss.detach(), {p: torch.zeros_like(p) if g is None else g for p, g in pairs}

    def gradients_at(self, parameters: Sequence[nn.Parameter]) -> Mapping[nn.Parameter, Tensor]:
        """The gradients at the present weights."""
        return self.evaluate(parameters)[1]

    @contextlib.contextmanager
    def stepped(self, parameters: Sequence[nn.Parameter], length: float) -> Iterator[None]:
        """With these parameters moved against their gradient."""
        before = [parameter.detach().clone() for parameter in parameters]
        try:
            for parameter in parameters:
                parameter.data.sub_(self.gradient[parameter], alpha=length)
            yield
        finally:
            for parameter, value in zip(parameters, before, strict=True):
                parameter.data.copy_(value)

    def units(self) -> dict[str, Tensor]:
        """What comes out of each activation, (values, units)."""
        with untouched(self.model), in_mode(self.model, None), torch.no_grad(), outputs(self.model) as found:
            self.run(self.model, copied(self.batch))
            return {name: by_unit(wide(y)) for name, y in found.items()}


@contextlib.contextmanager
def outputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """By name, what comes out of activations, in the order of their last calls."""
    found: dict[str, Tensor] = {}
    inside = carried_out(model)
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if activation_of(module) is not None and id(module) not in inside:
                stack.callback(module.register_forward_hook(_keep(found, name)).remove)
        yield found


def _keep(found: dict[str, Tensor], name: str) -> Any:
    def note(module: nn.Module, args: tuple, output: Any) -> Tensor | None:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        found.pop(name, None)
        found[name] = output.clone()  # what comes next may write over it
        return found[name].clone() if output.requires_grad else None

    return note


def floats(output: Any) -> Iterable[Tensor]:
    leaves = pytree.tree_leaves(dict(output) if isinstance(output, dict) else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def length_of(tensors: Iterable[Tensor]) -> Tensor:
    """Of all of them as one vector."""
    return torch.stack([wide(t).square().sum().double() for t in tensors]).sum().sqrt()
