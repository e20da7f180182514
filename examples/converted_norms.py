"""What a trained batch-norm network keeps when its norms become group norms, with and without fitting scale and shift.

    python examples/converted_norms.py records/surgery/convert.json

The residual network of `normkit compare digits-cnn` is trained with batch norm. Its norms are then converted in two
ways: weight and bias carried over as they are ("carried"), and fitted on 256 training samples ("matched",
`nk.convert_(model, to, match=x)`). Reported is the accuracy on held-out samples before the conversion, right after it,
and after one more epoch of training; beside it the batch-norm network itself after one more epoch.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normkit as nk
from normkit.lab.tasks.digits_cnn import digits_cnn

BATCH, STEPS, RATE, MOMENTUM, MATCHED = 50, 400, 0.05, 0.9, 256
FINE = (0.003, 0.01)
"""Rates of the epoch after the conversion. A pilot at 0.05, as before it, lost all converted networks but one kind."""
TARGETS, SEEDS = ("group:auto", "group:4", "layer", "instance", "rms", "dyt"), range(5)
Sample = tuple[Tensor, Tensor]


def main(path: Path) -> None:
    runs = [one for seed in SEEDS for one in run(seed)]
    record = {
        "what": "accuracy of a batch-norm network whose norms are converted, before and after one epoch of training",
        "command": f"python examples/converted_norms.py {path}",
        "torch": torch.__version__,
        "normkit": nk.__version__,
        "task": "digits-cnn, 8 layers of 16 channels",
        "training_steps": STEPS,
        "batch_size": BATCH,
        "learning_rate": RATE,
        "learning_rates_of_the_epoch": FINE,
        "momentum": MOMENTUM,
        "samples_matched_on": MATCHED,
        "summary": [summary(to, way, runs) for to in dict.fromkeys(r["to"] for r in runs) for way in ways(to, runs)],
        "runs": runs,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def run(seed: int) -> list[dict[str, Any]]:
    """One network: trained, then converted in every way and trained for one epoch more."""
    torch.manual_seed(seed)
    experiment = digits_cnn()
    data = experiment.data(seed)
    model = experiment.model(nk.factory("batch"))
    experiment.initial(model, torch.Generator().manual_seed(seed))
    draw = torch.Generator().manual_seed(seed)
    batches = [data.train.take(torch.randint(len(data.train), (BATCH,), generator=draw)) for _ in range(STEPS)]
    train(model, batches, RATE)
    held_out = data.validation.first(len(data.validation))
    permuted = torch.randperm(len(data.train), generator=draw)
    epoch = [data.train.take(part) for part in permuted.split(BATCH) if len(part) == BATCH]
    match = data.train.take(permuted[:MATCHED])[0]
    trained = accuracy(model, held_out)
    found = [{"to": "batch", "way": "not converted", "seed": seed, "trained": trained, "converted": trained}]
    networks = [copy.deepcopy(model)]
    for to in TARGETS:
        for way in ("carried", "matched"):
            converted = copy.deepcopy(model)
            nk.convert_(converted, to, match=match if way == "matched" else None)
            told = {"to": to, "way": way, "seed": seed, "trained": trained}
            found.append({**told, "converted": accuracy(converted, held_out)})
            networks.append(converted)
    for told, network in zip(found, networks, strict=True):
        for rate in FINE:
            tuned = copy.deepcopy(network)
            train(tuned, epoch, rate)
            told[after(rate)] = accuracy(tuned, held_out)
    return found


def after(rate: float) -> str:
    return f"after one epoch at {rate:g}"


def train(model: nn.Module, batches: list[Sample], rate: float) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=MOMENTUM)
    model.train()
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, held_out: Sample) -> float:
    x, y = held_out
    return (model.eval()(x).argmax(1) == y).double().mean().item()


def ways(to: str, runs: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(r["way"] for r in runs if r["to"] == to))


def summary(to: str, way: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, least and greatest over the seeds."""
    chosen = [r for r in runs if (r["to"], r["way"]) == (to, way)]
    spread = lambda values: {"mean": statistics.fmean(values), "least": min(values), "greatest": max(values)}
    moments = ("trained", "converted", *map(after, FINE))
    return {"to": to, "way": way, **{moment: spread([r[moment] for r in chosen]) for moment in moments}}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
