"""What a trained batch-norm network keeps when its norms are taken out, and the variance in a ResNet-50 without norms.

    python examples/normalizer_free.py records/surgery/normalizer-free.json

The residual network of `normkit compare digits-cnn` is trained with batch norm, then converted by
`nk.convert_(model, to="normalizer-free", match=x)` on 256 training samples and trained for one epoch more, with and
without adaptive gradient clipping. Reported is the accuracy on held-out samples before, right after, and after the
epoch; beside it the batch-norm network itself after the same epoch. Then the ResNet-50 of `normkit bench` is converted
at its initial weights: the variance behind every block, on images that nothing was measured on.
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
from normkit.bench.models import ResNet
from normkit.lab.tasks.digits_cnn import digits_cnn

BATCH, STEPS, RATE, MOMENTUM, MATCHED = 50, 400, 0.05, 0.9, 256
FINE, CLIP = (0.003, 0.01, 0.05), 0.02
WAYS, SEEDS = ("batch", "normalizer-free", f"normalizer-free, clip {CLIP}"), range(5)
IMAGES, DRAWN = (16, 3, 96, 96), range(3)
Sample = tuple[Tensor, Tensor]


def main(path: Path) -> None:
    runs = [one for seed in SEEDS for one in run(seed)]
    record = {
        "what": "accuracy of a batch-norm network whose norms are taken out; variance in a ResNet-50 without norms",
        "command": f"python examples/normalizer_free.py {path}",
        "torch": torch.__version__,
        "normkit": nk.__version__,
        "task": "digits-cnn, 8 layers of 16 channels",
        "training_steps": STEPS,
        "batch_size": BATCH,
        "learning_rate": RATE,
        "learning_rates_of_the_epoch": FINE,
        "momentum": MOMENTUM,
        "samples_matched_on": MATCHED,
        "summary": [summary(way, runs) for way in WAYS],
        "resnet50": [resnet_50(seed) for seed in DRAWN],
        "runs": runs,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def run(seed: int) -> list[dict[str, Any]]:
    """One network: trained, and trained for one epoch more as it is and converted."""
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
    without = copy.deepcopy(model)
    certificate = nk.convert_(without, to="normalizer-free", match=data.train.take(permuted[:MATCHED])[0])
    found = []
    for way in WAYS:
        network = model if way == "batch" else without
        told = {
            "way": way,
            "seed": seed,
            "trained": accuracy(model, held_out),
            "converted": accuracy(network, held_out),
        }
        for rate in FINE:
            tuned = copy.deepcopy(network)
            train(tuned, epoch, rate, CLIP if "clip" in way else None)
            told[after(rate)] = accuracy(tuned, held_out)
        found.append(told | ({} if way == "batch" else {"variances": variances(certificate)}))
    return found


def resnet_50(seed: int) -> dict[str, Any]:
    """At its initial weights; half of the images are measured on, the other half are what is told of."""
    torch.manual_seed(seed)
    certificate = nk.convert_(ResNet(), to="normalizer-free", match=torch.randn(IMAGES))
    return {"seed": seed, "images": IMAGES, "certificate": certificate.verdict, "variances": variances(certificate)}


def variances(certificate: Any) -> list[float]:
    """Behind every block, from the first to the last."""
    return [round(float(r.value), 4) for r in certificate.readings if r.quantity == "variance"]


def after(rate: float) -> str:
    return f"after one epoch at {rate:g}"


def train(model: nn.Module, batches: list[Sample], rate: float, clip: float | None = None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=MOMENTUM)
    if clip is not None:
        nk.clip_adaptively_before_steps(optimizer, clip, skip=model[-1].parameters())
    model.train()
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, held_out: Sample) -> float:
    x, y = held_out
    return (model.eval()(x).argmax(1) == y).double().mean().item()


def summary(way: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, least and greatest over the seeds."""
    chosen = [r for r in runs if r["way"] == way]
    spread = lambda values: {"mean": statistics.fmean(values), "least": min(values), "greatest": max(values)}
    return {"way": way} | {m: spread([r[m] for r in chosen]) for m in ("trained", "converted", *map(after, FINE))}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
