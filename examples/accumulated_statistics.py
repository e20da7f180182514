"""How far the running statistics of gradient accumulation are from those of the large batch, norm by norm.

    python examples/accumulated_statistics.py records/statistics/accumulation.json

A residual network of 20 layers with 19 batch norms (the `digits-cnn` of `normkit compare`) is trained on steps of 64
samples in micro-batches. Then, on the trained weights, the running statistics of 20 steps are taken in three ways: by
the batches of 64 ("large"), by micro-batches inside `nk.accumulate_statistics` ("pooled"), and by every micro-batch by
itself, as torch takes them ("each"). Reported are the differences of the second and third to the first, and the
accuracy on held-out samples in evaluation.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normkit as nk
from normkit.lab.tasks.digits_cnn import digits_cnn

STEP, DEPTH, TRAINING, MEASURED, RATE = 64, 20, 60, 20, 0.05
MICRO, SEEDS = (2, 4, 8, 16, 32), (0, 1, 2)
Steps = list[tuple[Tensor, Tensor]]


def main(path: Path) -> None:
    runs = [run(micro, seed) for micro in MICRO for seed in SEEDS]
    record = {
        "what": "running statistics of gradient accumulation against those of the large batch",
        "command": f"python examples/accumulated_statistics.py {path}",
        "torch": torch.__version__,
        "normkit": nk.__version__,
        "samples_per_step": STEP,
        "depth": DEPTH,
        "training_steps": TRAINING,
        "measured_steps": MEASURED,
        "learning_rate": RATE,
        "summary": [summary(micro, [one for one in runs if one["micro_batch"] == micro]) for micro in MICRO],
        "runs": runs,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def run(micro: int, seed: int) -> dict:
    """One network: trained, and measured in three ways."""
    torch.manual_seed(seed)
    experiment = digits_cnn(depth=DEPTH)
    data = experiment.data(seed)
    model = experiment.model(nk.factory("batch"))
    experiment.initial(model, torch.Generator().manual_seed(seed))
    order = torch.Generator().manual_seed(seed)
    draw = lambda: data.train.take(torch.randint(len(data.train), (STEP,), generator=order))
    train(model, [draw() for _ in range(TRAINING)], micro)
    steps = [draw() for _ in range(MEASURED)]
    large, pooled, each = (measured(model, steps, size, together) for size, together in ways(micro))
    held_out = data.validation.first(len(data.validation))
    return {
        "micro_batch": micro,
        "seed": seed,
        "accuracy": {n: accuracy(m, held_out) for n, m in (("large", large), ("pooled", pooled), ("each", each))},
        "pooled": differences(pooled, large),
        "each": differences(each, large),
    }


def ways(micro: int) -> list[tuple[int, bool]]:
    """Samples per forward pass, and whether the forward passes of a step belong together."""
    return [(STEP, False), (micro, True), (micro, False)]


def train(model: nn.Module, steps: Steps, micro: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    with nk.accumulate_statistics(model, optimizer=optimizer):
        for x, y in steps:
            optimizer.zero_grad()
            for part, target in zip(x.split(micro), y.split(micro), strict=True):
                (F.cross_entropy(model(part), target) * len(part) / len(x)).backward()
            optimizer.step()


@torch.no_grad()
def measured(model: nn.Module, steps: Steps, size: int, together: bool) -> nn.Module:
    """A copy whose running statistics are the averages over these steps."""
    model = copy.deepcopy(model).train()
    for norm in norms(model).values():
        norm.reset_running_stats()
        norm.momentum = None
    for x, _ in steps:
        if together:
            with nk.accumulate_statistics(model):
                forward(model, x, size)
        else:
            forward(model, x, size)
    return model


def forward(model: nn.Module, x: Tensor, size: int) -> None:
    for part in x.split(size):
        model(part)


def norms(model: nn.Module) -> dict[str, nk.BatchNorm2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nk.BatchNorm2d)}


def differences(model: nn.Module, large: nn.Module) -> list[dict]:
    """By norm, in the order of the network; root mean squares over the channels."""
    found = []
    for (name, norm), wanted in zip(norms(model).items(), norms(large).values(), strict=True):
        mean = (norm.running_mean - wanted.running_mean) / wanted.running_var.sqrt()
        var = norm.running_var / wanted.running_var - 1
        found.append({"norm": name, "mean_in_deviations": rms(mean), "variance_relative": rms(var)})
    return found


def rms(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()


@torch.no_grad()
def accuracy(model: nn.Module, held_out: tuple[Tensor, Tensor]) -> float:
    x, y = held_out
    return (model.eval()(x).argmax(1) == y).double().mean().item()


def summary(micro: int, runs: list[dict]) -> dict:
    """Means over the seeds: the difference of the first norm; of all later ones the median; the largest."""
    found: dict = {"micro_batch": micro}
    for way in ("pooled", "each"):
        for name in ("mean_in_deviations", "variance_relative"):
            values = [[norm[name] for norm in one[way]] for one in runs]
            found[f"{way} {name}"] = {
                "first": statistics.fmean(v[0] for v in values),
                "median": statistics.fmean(statistics.median(v[1:]) for v in values),
                "largest": statistics.fmean(max(v) for v in values),
            }
    for way in ("large", "pooled", "each"):
        found[f"accuracy {way}"] = statistics.fmean(one["accuracy"][way] for one in runs)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
