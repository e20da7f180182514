"""How long a training step takes before and after a switch of strategies, on a machine that does nothing else.

    OMP_NUM_THREADS=1 python examples/step_after_a_switch.py records/strategies/steps.json

The networks of `normkit compare` with their norms as they begin, and as strategies leave them: frozen, and folded into
the layers beside them; in the Transformer by way of RepBN. Every round takes a few steps of each, in another order; a
ratio is that of the medians of one round, and reported is the median over rounds, and the quartiles.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import normkit as nk
from normkit.lab import Experiment
from normkit.lab.arm import Arm
from normkit.lab.build import build_model
from normkit.lab.tasks.digits_cnn import digits_cnn
from normkit.lab.tasks.digits_deep import digits_deep
from normkit.lab.tasks.text import text

ROUNDS, STEPS, RATE = 30, 5, 1e-4
Way = Callable[[nn.Module, Any], None]


def as_it_is(model: nn.Module, inputs: Any) -> None:
    """The control."""


def frozen(model: nn.Module, inputs: Any) -> None:
    nk.freeze_(model)


def folded(model: nn.Module, inputs: Any) -> None:
    nk.freeze_(model)
    nk.fold_(model, inputs)


def rep(model: nn.Module, inputs: Any) -> None:
    nk.progressive_(model, steps=1)
    model(inputs)
    nk.settle_(model)


def after_rep(way: Way) -> Way:
    def both(model: nn.Module, inputs: Any) -> None:
        rep(model, inputs)
        way(model, inputs)

    return both


BATCH: dict[str, Way] = {"batch": as_it_is, "batch again": as_it_is, "batch, frozen": frozen, "batch, folded": folded}
LAYER: dict[str, Way] = {
    "layer": as_it_is,
    "layer again": as_it_is,
    "RepBN": rep,
    "RepBN, frozen": after_rep(frozen),
    "RepBN, folded": after_rep(folded),
}
NETWORKS = ((digits_cnn, "batch", BATCH), (digits_deep, "batch", BATCH), (text, "layer", LAYER))


def main(path: Path) -> None:
    record = {
        "what": "milliseconds of a training step before and after a switch, and how many times as long as before",
        "command": f"OMP_NUM_THREADS={torch.get_num_threads()} python examples/step_after_a_switch.py {path}",
        "torch": torch.__version__,
        "normkit": nk.__version__,
        "threads": torch.get_num_threads(),
        "rounds": ROUNDS,
        "steps_a_round": STEPS,
        "networks": {make().name: measured(make(), norm, ways) for make, norm, ways in NETWORKS},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def measured(experiment: Experiment, norm: str, ways: dict[str, Way]) -> list[dict[str, Any]]:
    """The ways a network can stand after a switch, the first of them before it."""
    torch.manual_seed(0)
    data: Any = experiment.data(0) if callable(experiment.data) else experiment.data
    inputs, targets = data.train.take(torch.arange(experiment.batch_size))
    steps = {}
    for name, way in ways.items():
        model, _ = build_model(experiment, Arm(norm), 0)
        model.train()
        way(model, inputs)
        kind = torch.optim.AdamW if experiment.optimizer == "adamw" else torch.optim.SGD
        steps[name] = _step(model, kind(model.parameters(), RATE), experiment, inputs, targets)
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    order = random.Random(0)
    for number in range(ROUNDS + 1):
        for name in order.sample(list(ways), len(ways)):
            times = [steps[name]() for _ in range(STEPS)]
            if number:  # the first round is a warm-up
                rounds[name].append(statistics.median(times))
    first = next(iter(ways))
    return [_told(name, rounds[name], rounds[first]) for name in ways]


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, experiment: Experiment, inputs: Any, targets: Any) -> Any:
    def step() -> float:
        begin = time.perf_counter()
        optimizer.zero_grad()
        experiment.loss(model(inputs), targets).backward()
        optimizer.step()
        return time.perf_counter() - begin

    return step


def _told(name: str, seconds: list[float], before: list[float]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles([own / other for own, other in zip(seconds, before, strict=True)], n=4)
    return {"norms": name, "ms": 1e3 * statistics.median(seconds), "times_as_long": middle, "quartiles": [low, high]}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
