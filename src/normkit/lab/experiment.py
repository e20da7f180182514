"""Experiment: what `normkit compare` compares on: a model builder, data, a loss, a metric and a target."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from normkit.lab.arm import OPTIMIZERS, Arm
from normkit.lab.data import Data
from normkit.lab.errors import LabError, nearest

# Half-decade steps, wide enough that the best rate of SGD with and without a norm lies inside (docs/compare.md).
SGD_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
MOMENTUM_RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
ADAM_RATES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class Metric:
    """What the race is about: a function of all outputs and all targets of a split, and which way is better."""

    name: str
    function: Callable[[Tensor, Tensor], Tensor | float]
    higher_is_better: bool = True
    unit: str = "fraction"

    def better(self, value: float, other: float) -> bool:
        """Whether value beats other; nan never does."""
        return value > other if self.higher_is_better else value < other

    def reached(self, value: float, target: float) -> bool:
        """Whether value is at the target or beyond; nan never is."""
        return value >= target if self.higher_is_better else value <= target

    @property
    def worst(self) -> float:
        return -math.inf if self.higher_is_better else math.inf

    def record(self) -> dict[str, Any]:
        """The metric as experiment.json has it."""
        return {"name": self.name, "higher_is_better": self.higher_is_better, "unit": self.unit}


def _accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(-1) == targets).float().mean()


ACCURACY = Metric("accuracy", _accuracy)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything a comparison needs to know about a network and its data; the arms say which norm goes in.

    model: builder `model(norm_layer)`, where `norm_layer(num_features)` builds the norm of an arm. When it also takes
        `dropout` and `placement` ("before" or "after" the activation), arms with these can be compared.
    data: `(train, validation, test)`, or a function of the seed that returns them. Each is a pair of tensors `(x, y)`,
        a map-style dataset, or a `DataLoader`, of which the dataset and `collate_fn` are used: the order of the
        samples is the lab's, so that every arm sees the same batches.
    target: the value of the metric on validation data that ends the race: a constant, fixed before any result.
    loss: a function of outputs and targets; metric: a `Metric`, of all outputs and targets of a split together.
    arms: the arms compared when the command names none, and quick_arms those of a quick look (default: the same);
        baseline: the arm ratios are taken against (default: the arm without a norm, or the first).
    optimizer: of the arms that name none. rates: the learning-rate grid, at least 7 log-spaced values.
    steps, eval_every, batch_size: optimizer steps of a full run; steps between evaluations; samples per step.
    dim: 1 when norms see features (n, c), 2 for images (n, c, h, w), 3 for volumes.
    initial: draws the initial weights, `initial(model, generator)`; None keeps what the builder drew.
    between_steps: callables that may act on the model between two steps (`normkit.lab.Step`). One that has
        `conclude(model, data)` is asked when a final run has ended, and what it returns goes into its status.json.
    fold: whether a final run ends with the time of the network in evaluation, before and after `normkit.fold`.
    update: how a step is taken, `update(model, optimizer, inputs, targets)`, where it is more than the loss of one
        forward pass going down; returns the loss that is logged. What it draws comes from the global generators.
    optimizer_options: further arguments of `optimizer`, as torch names them; not of one that an arm names.
    probed: how many validation samples are looked at inside the network while a final run trains (inside.jsonl);
        fewer where one sample is a whole sequence of what a norm counts as samples.
    """

    model: Callable[..., nn.Module]
    data: Data | tuple[Any, Any, Any] | Callable[[int], Any]
    target: float
    name: str = "experiment"
    title: str = ""
    description: str = ""
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    metric: Metric = ACCURACY
    arms: Sequence[str | Arm] = ("none", "batch", "layer", "rms")
    quick_arms: Sequence[str | Arm] | None = None
    baseline: str | None = None
    optimizer: str = "sgd"
    rates: Sequence[float] = SGD_RATES
    steps: int = 2000
    quick_steps: int | None = None
    eval_every: int = 5
    batch_size: int = 60
    dim: int = 1
    initial: Callable[..., None] | None = None
    between_steps: Sequence[Callable[..., None]] = ()
    fold: bool = False
    update: Callable[[nn.Module, Optimizer, Any, Tensor], Tensor] | None = None
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    probed: int = 512

    def __post_init__(self) -> None:
        for name in ("steps", "quick_steps", "eval_every", "batch_size", "probed"):
            number = getattr(self, name)
            if number is not None and (not isinstance(number, int) or number < 1):
                raise LabError(f"Experiment {self.name}: {name}={number!r}; give a whole number from 1")
        if not callable(self.model):
            raise LabError(
                f"Experiment {self.name}: model is {type(self.model).__name__}; give a function model(norm_layer) that "
                "builds the network"
            )
        if not isinstance(self.metric, Metric):
            raise LabError(f"Experiment {self.name}: metric is {type(self.metric).__name__}; give a normkit.lab.Metric")
        if self.optimizer not in OPTIMIZERS:
            raise LabError(
                f"Experiment {self.name}: unknown optimizer {self.optimizer!r}{nearest(self.optimizer, OPTIMIZERS)} "
                f"(known: {', '.join(OPTIMIZERS)})"
            )
