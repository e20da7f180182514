"""What re-estimated running statistics do for averaged weights, and where they do nothing.

    python examples/calibrated_averages.py records/surgery/calibrate.json

The residual network of `normkit compare digits-cnn`, with batch norm, is trained at a rate that stays high. Weights are
averaged in four ways: over the second half of the run (SWA, `torch.optim.swa_utils.AveragedModel`, whose buffers are
those of the last step), exponentially with such buffers (EMA), exponentially with averaged buffers (EMA, buffers too),
and not at all after a run whose rate falls to 0 (annealed). Reported is the accuracy on held-out samples as they are,
after torch's `update_bn`, and after `nk.calibrate_`, on shuffled batches of 50 and on batches of 2 and 100 that are
sorted by class; and the greatest drift of a layer before and after.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import normkit as nk
from normkit.lab.tasks.digits_cnn import digits_cnn

BATCH, STEPS, RATE, MOMENTUM, DECAY, EVERY = 50, 300, 0.2, 0.9, 0.98, 5
SEEDS = range(5)
Sample = tuple[Tensor, Tensor]


def main(path: Path) -> None:
    runs = [one for seed in SEEDS for one in run(seed)]
    record = {
        "what": "accuracy of averaged weights before and after their running statistics are re-estimated",
        "command": f"python examples/calibrated_averages.py {path}",
        "torch": torch.__version__,
        "normkit": nk.__version__,
        "task": "digits-cnn, 8 layers of 16 channels",
        "training_steps": STEPS,
        "batch_size": BATCH,
        "learning_rate": RATE,
        "momentum": MOMENTUM,
        "swa": f"second half of the run, every {EVERY} steps",
        "ema_decay": DECAY,
        "summary": [summary(way, runs) for way in dict.fromkeys(r["weights"] for r in runs)],
        "runs": runs,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def run(seed: int) -> list[dict[str, Any]]:
    """One seed: two training runs, four models, each with three kinds of running statistics."""
    torch.manual_seed(seed)
    experiment = digits_cnn()
    data = experiment.data(seed)
    model = experiment.model(nk.factory("batch"))
    experiment.initial(model, torch.Generator().manual_seed(seed))
    annealed = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(seed)
    batches = [data.train.take(torch.randint(len(data.train), (BATCH,), generator=draw)) for _ in range(STEPS)]
    average = get_ema_multi_avg_fn(DECAY)
    swa, ema = AveragedModel(model), AveragedModel(model, multi_avg_fn=average)
    both = AveragedModel(model, multi_avg_fn=average, use_buffers=True)

    def follow(step: int) -> None:
        if step >= STEPS // 2 and step % EVERY == 0:
            swa.update_parameters(model)
        ema.update_parameters(model)
        both.update_parameters(model)

    train(model, batches, lambda step: RATE, follow)
    train(annealed, batches, lambda step: RATE * (1 + math.cos(math.pi * step / STEPS)) / 2, lambda step: None)
    held_out = data.validation.first(len(data.validation))
    samples = data.train.take(torch.randperm(len(data.train), generator=draw))
    models = {"last step": model, "SWA": swa, "EMA": ema, "EMA, buffers too": both, "annealed": annealed}
    return [told(name, network, samples, held_out, seed) for name, network in models.items()]


def train(model: nn.Module, batches: list[Sample], rate: Callable[[int], float], after: Callable[[int], None]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    model.train()
    for step, (x, y) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        after(step)


def told(name: str, network: nn.Module, samples: Sample, held_out: Sample, seed: int) -> dict[str, Any]:
    """Accuracies of one model with each kind of running statistics."""
    drifts: dict[str, float] = {}
    found: dict[str, Any] = {"weights": name, "seed": seed, "as it is": accuracy(network, held_out)}
    for loader, sizes in (("equal batches", equal(samples)), ("unequal batches", unequal(samples))):
        by_torch, ours = copy.deepcopy(network), copy.deepcopy(network)
        update_bn(sizes, by_torch)
        certificate = nk.calibrate_(ours, sizes, steps=None)
        if loader == "equal batches":
            drifts = {moment: greatest(certificate, moment) for moment in ("before", "after")}
        found[f"update_bn, {loader}"] = accuracy(by_torch, held_out)
        found[f"calibrate_, {loader}"] = accuracy(ours, held_out)
    return {**found, **{f"greatest drift {moment}": drift for moment, drift in drifts.items()}}


def greatest(certificate: nk.Certificate, moment: str) -> float:
    return max(reading.value for reading in certificate.readings if reading.quantity == f"drift {moment}")


def equal(samples: Sample) -> list[Sample]:
    return list(zip(*(part.split(BATCH) for part in samples), strict=True))


def unequal(samples: Sample) -> list[Sample]:
    """Sorted by class, in batches of 2 and of 100: what pooling by counts is for."""
    order = samples[1].argsort(stable=True)
    sizes = [2, 100] * (len(order) // 102)
    cut = [part[order][: sum(sizes)].split(sizes) for part in samples]
    return list(zip(*cut, strict=True))


@torch.no_grad()
def accuracy(model: nn.Module, held_out: Sample) -> float:
    x, y = held_out
    return (model.eval()(x).argmax(1) == y).double().mean().item()


def summary(weights: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, least and greatest over the seeds."""
    chosen = [r for r in runs if r["weights"] == weights]
    spread = lambda values: {"mean": statistics.fmean(values), "least": min(values), "greatest": max(values)}
    return {
        "weights": weights,
        **{key: spread([r[key] for r in chosen]) for key in chosen[0] if key not in ("weights", "seed")},
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
