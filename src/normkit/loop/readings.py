"""What strategies read during training: measured now and then on the batch that came by, the same on every process."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from normkit.norms.switchable_norm import SwitchableNorm
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.reading import Reading

KEPT = 2000
"""Readings that are kept; older ones are forgotten."""
_LOSS, _NOISE = "loss", "gradient_noise"
_SWITCHABLE = frozenset({"switchable_share", "switchable_choice"})


class Readings:
    """Measures what is needed, every so many steps, and remembers."""

    def __init__(self, needs: frozenset[str], every: int) -> None:
        if every < 1:
            raise ValueError(f"attach: every={every}; it is a number of steps, 1 or more")
        self.needs, self.every = needs, every
        self.kept: list[Reading] = []
        self.gradient: list[Tensor] = []

    @property
    def evidence(self) -> Evidence:
        """All that is remembered."""
        return Evidence(self.kept)

    @property
    def of_the_loss(self) -> bool:
        """Whether anybody wants to know it."""
        return _LOSS in self.needs

    def loss(self, value: float, step: int) -> None:
        """A loss that the training loop tells of."""
        self._keep([Reading(_LOSS, value, step=step)])

    def read(self, model: nn.Module, batch: Any, step: int) -> None:
        """After a step: its gradients are still there."""
        if not self.needs - {_LOSS}:
            return
        if step % self.every == 0:
            self._measure(model, batch, step)
        if _NOISE in self.needs and (step + 1) % self.every == 0:
            self.gradient = [p.grad.detach().clone() for p in model.parameters() if p.grad is not None]

    def _measure(self, model: nn.Module, batch: Any, step: int) -> None:
        found: list[Reading] = []
        if _NOISE in self.needs and self.gradient:
            found.append(Reading(_NOISE, noise(self.gradient, model), step=step, unit="of the mean gradient's square"))
        if self.needs & _SWITCHABLE:
            found += switchable(model, step)
        measured = self.needs - _SWITCHABLE - {_LOSS, _NOISE}
        if measured and batch is not None:
            from normkit.measure.collect import measure

            readings = measure(model, batch, quantities=measured, call=lambda m, b: m(*b[0], **b[1]))
            found += [Reading(r.quantity, r.value, r.module, step, r.unit) for r in readings]
        self._keep(_agreed(found, model))

    def _keep(self, readings: list[Reading]) -> None:
        self.kept = [*self.kept, *readings][-KEPT:]

    def state_dict(self) -> dict[str, Any]:
        """Plain data, and the gradient that waits for its neighbour."""
        return {"kept": [asdict(reading) for reading in self.kept], "gradient": self.gradient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        self.kept = [Reading(**reading) for reading in state["kept"]]
        self.gradient = list(state["gradient"])


def noise(before: list[Tensor], model: nn.Module) -> float:
    """The variance of the gradient over the square of its mean, from the gradients of two steps in a row.

    ``|a - b|**2 / 2`` estimates the variance and ``a @ b`` the square of the mean, as long as the weights have moved
    little in between. Infinite where the two are no more alike than chance. The noise scale of McCandlish et al. 2018,
    arXiv:1812.06162, in units of the batch.
    """
    from normkit.measure.collect import fetched

    now = [p.grad for p in model.parameters() if p.grad is not None]
    if len(now) != len(before):
        return float("inf")
    apart = [(a - b).double().square().sum() for a, b in zip(before, now, strict=True)]
    alike = [(a.double() * b.double()).sum() for a, b in zip(before, now, strict=True)]
    numbers = fetched([*apart, *alike])
    square, mean = sum(numbers[: len(apart)]) / 2, sum(numbers[len(apart) :])
    return square / mean if mean > 0 else float("inf")


def switchable(model: nn.Module, step: int) -> list[Reading]:
    """What the switchable norms weight most, and how much, in the mean or the variance, whichever is less."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, SwitchableNorm):
            parts = module.weights()
            choice = max(parts["mean"], key=lambda kind: parts["mean"][kind] + parts["var"][kind])
            found.append(Reading("switchable_choice", choice, name, step))
            found.append(Reading("switchable_share", min(parts["mean"][choice], parts["var"][choice]), name, step))
    return found


def _agreed(readings: list[Reading], model: nn.Module) -> list[Reading]:
    """The mean over all processes, so that all decide alike. Words come from parameters, which are the same."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return readings
    numbers = [r for r in readings if isinstance(r.value, (int, float))]
    own = [float(r.value) for r in numbers]  # type: ignore[arg-type]
    device = next((p.device for p in model.parameters()), None)  # NCCL sends nothing that is on the CPU
    values = torch.tensor(own, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    shared = iter((values / dist.get_world_size()).tolist())
    return [
        Reading(r.quantity, next(shared), r.module, r.step, r.unit) if isinstance(r.value, (int, float)) else r
        for r in readings
    ]
