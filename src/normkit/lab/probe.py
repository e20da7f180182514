"""Probe: what happens inside the network while it trains, without changing the run by one bit.

It draws no random number, runs its forward pass on copies of the buffers, and reads the gradients that the training
step has left, so it costs no backward pass. A test compares a probed run with one that is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from normkit.lab.initial import weights_of
from normkit.lab.journal import Journal
from normkit.lab.step import Step
from normkit.measure import sites
from normkit.measure.untouched import untouched
from normkit.norms.switchable_norm import SwitchableNorm

ACTIVATIONS = (
    nn.Sigmoid, nn.Tanh, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus,
    nn.Hardtanh, nn.Hardswish, nn.PReLU,
)  # fmt: skip
UNIT = 0  # which unit of the last hidden layer: any, but the same one in every arm and run
PERCENTILES = (0.15, 0.50, 0.85)  # as Ioffe & Szegedy 2015, figure 1
SAMPLES = 512


class Probe:
    """Acts between steps: writes one line of inside.jsonl at each of `moments(steps)`."""

    def __init__(self, journal: Journal, batch: Any, steps: int):
        self.journal, self.batch = journal, batch
        self.moments = moments(steps)
        self.with_gradients = {1, self.moments[len(self.moments) // 2], steps}

    def __call__(self, step: Step) -> None:
        if step.number not in self.moments:
            return
        inputs = activation_inputs(step.model, self.batch)
        line: dict[str, Any] = {
            "step": step.number,
            "unit": _percentiles(inputs),
            "activation_std": _deviations(inputs),
        }
        if step.number in self.with_gradients:
            line["gradient_norms"] = gradient_norms(step.model)
        if learnt := {name: m.weights() for name, m in step.model.named_modules() if isinstance(m, SwitchableNorm)}:
            line["switchable"] = learnt
        self.journal.append(line)


def moments(steps: int, count: int = 40) -> list[int]:
    """Steps at which to look: dense at the start, where most happens, then even; 1 and `steps` are among them."""
    early = [round(steps ** (index / (count - 1))) for index in range(count)]
    even = [max(1, round(steps * index / (count // 2))) for index in range(count // 2 + 1)]
    return sorted({*early, *even})


def activation_inputs(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """The input of every activation module in a training-mode forward pass that leaves model and generators alone.

    Training mode, because these are the values that training works with: in evaluation a batch norm would show its
    running statistics, which lag behind.
    """
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.__setitem__(name, inputs[0].detach().clone())
        )
        for name, module in model.named_modules()
        if isinstance(module, ACTIVATIONS)
    ]
    try:
        with torch.no_grad(), untouched(model):
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@contextmanager
def untouched_generators() -> Iterator[None]:
    """Gives the global generators back as they were: dropout inside draws, the run must not notice."""
    from normkit.lab.checkpoint import random_state, restore_random

    state = random_state()
    try:
        yield
    finally:
        restore_random(state)


def by_unit(x: Tensor) -> Tensor:
    """(samples, units): axis 1 holds the units of (n, c) and images (n, c, h, w), the last axis those of (n, t, c)."""
    return sites.by_unit(x).float()


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Euclidean norm of the gradient of each weight matrix, as the last step left it."""
    return {name: float(weight.grad.norm()) for name, weight in weights_of(model) if weight.grad is not None}


def _percentiles(inputs: dict[str, Tensor]) -> dict[str, Any] | None:
    if not inputs:
        return None
    layer, x = list(inputs.items())[-1]
    unit = by_unit(x)[:, UNIT]
    if not bool(torch.isfinite(unit).all()):
        return {"layer": layer, "percentiles": [math.nan] * len(PERCENTILES)}
    return {"layer": layer, "percentiles": torch.quantile(unit[:100_000], torch.tensor(PERCENTILES)).tolist()}


def _deviations(inputs: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(x.float().std(correction=0)) for name, x in inputs.items()}
