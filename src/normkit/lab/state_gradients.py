"""How much of the gradient reaches each time step of a recurrent network, at three steps of its training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from normkit.blocks.recurrent_loop import Recurrent
from normkit.lab.data import Data
from normkit.lab.step import Step
from normkit.measure.untouched import untouched

Loss = Callable[[Tensor, Tensor], Tensor]


class StateGradients:
    """Acts between steps: notes |dL/dh_t| behind the first, the middle and the last step, on the batch of that step.

    `conclude` hands it to status.json as `state_gradients`: per step taken, the norms of all time steps. A run that
    diverged ends earlier, and has fewer of them.
    """

    def __init__(self, loss: Loss) -> None:
        self.loss = loss
        self.noted: list[dict[str, Any]] = []

    def __call__(self, step: Step) -> None:
        if step.number in (1, (step.total + 1) // 2, step.total):
            norms = state_gradients(step.model, step.inputs, step.targets, self.loss)
            self.noted.append({"step": step.number, "norms": norms})

    def conclude(self, model: nn.Module, data: Data) -> dict[str, Any]:
        """What was noted; the trained network has nothing to add."""
        return {"state_gradients": self.noted}

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint of a run."""
        return {"noted": self.noted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where a checkpoint was."""
        self.noted = list(state["noted"])


def state_gradients(model: nn.Module, inputs: Any, targets: Tensor, loss: Loss) -> list[float]:
    """Euclidean norm of dL/dh_t for every time step, h_t (n, units) of all samples, in the last recurrent layer.

    The whole derivative: by way of all later states and of the output. The model is left as it was, in the mode it is
    in; none of its parameters gets a gradient.
    """
    with untouched(model), _states(model) as seen:
        value = loss(model(inputs), targets)
        last = seen[max(seen)]
        return [float(gradient.norm()) for gradient in torch.autograd.grad(value, last)]


@contextmanager
def _states(model: nn.Module) -> Iterator[dict[tuple[int, int], list[Tensor]]]:
    """The states of all recurrent layers as they arise, by module and by layer within it."""
    seen: dict[tuple[int, int], list[Tensor]] = {}
    recurrent = [module for module in model.modules() if isinstance(module, Recurrent)]

    def note(module: int) -> Callable[[int, int, Tensor], None]:
        return lambda place, step, h: seen.setdefault((module, place), []).append(h)

    try:
        for index, module in enumerate(recurrent):
            module.on_state = note(index)
        yield seen
    finally:
        for module in recurrent:
            module.on_state = None
