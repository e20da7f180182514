"""Features of digits for the Fréchet distance: a small classifier, trained once with a fixed seed and kept here.

``python -m normkit.lab.adversarial.digit_features`` trains it again and writes the file; nobody else needs to.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normkit.lab.labelled import Labelled
from normkit.lab.seeds import derive
from normkit.lab.tasks.samples import digits

FILE = Path(__file__).with_name("digit_features.npz")
SEED, STEPS, RATE, BATCH = 0, 1200, 3e-3, 100
WIDTH, FEATURES = 12, 16
NOISE = 0.2
"""Deviation of what is added to a pixel in training, of a range from -1 to 1."""
SURE = 0.9
"""A sample belongs to a class that has at least this probability."""


class DigitFeatures(nn.Module):
    """Images (n, 1, 8, 8) between -1 and 1 to logits (n, 10).

    ``features`` gives the layer before, (n, 16), of mean 0 and deviation 1 over the digits it was trained on, so that a
    Fréchet distance has a scale: 16 is as far from them as all features at one point.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, WIDTH, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(WIDTH, 2 * WIDTH, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(2 * WIDTH * 16, FEATURES)),
        )
        self.head = nn.Linear(FEATURES, 10)
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("deviation", torch.ones(FEATURES))

    def features(self, images: Tensor) -> Tensor:
        """(n, 1, 8, 8) -> (n, 16)."""
        return (self.body(images) - self.mean) / self.deviation

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images).relu())

    @torch.no_grad()
    def classes(self, images: Tensor) -> Tensor:
        """The class of each image (n,), -1 where the classifier is not sure."""
        probability, found = self(images).softmax(-1).max(-1)
        return torch.where(probability >= SURE, found, -1)


def as_generated(images: Tensor) -> Tensor:
    """Images of the lab's digits, from 0 to 1, in the range of a generator that ends in tanh."""
    return 2 * images - 1


@lru_cache(maxsize=1)
def load() -> tuple[DigitFeatures, float]:
    """The stored classifier and its accuracy on the test digits."""
    network = DigitFeatures()
    with np.load(FILE, allow_pickle=False) as stored:
        network.load_state_dict({name: torch.from_numpy(stored[name]) for name in network.state_dict()})
        return network.eval().requires_grad_(False), float(stored["accuracy"])


def accuracy(network: DigitFeatures, source: Labelled) -> float:
    """On the test digits, which no training sees."""
    assert source.test is not None
    images, labels = source.test
    with torch.no_grad():
        return float((network(as_generated(images)).argmax(-1) == labels).double().mean())


def train() -> DigitFeatures:
    """Trains it on all digits but the test digits, with noise on their pixels."""
    source, _ = digits(None)
    images, labels = as_generated(source.x), source.y
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(SEED, "digit features"))
        network = DigitFeatures()
        optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in range(STEPS):
            chosen = torch.randint(len(images), (BATCH,))
            noisy = images[chosen] + NOISE * torch.randn(BATCH, *images.shape[1:])
            optimizer.zero_grad()
            F.cross_entropy(network(noisy), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        deviation, mean = torch.std_mean(network.body(images), 0)
        network.mean.copy_(mean)
        network.deviation.copy_(deviation)
    return network.eval()


def write(path: Path = FILE) -> float:
    """Trains and stores it; returns the accuracy that is stored with it."""
    network = train()
    found = accuracy(network, digits(None)[0])
    weights = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    np.savez(path, accuracy=np.float64(found), seed=SEED, steps=STEPS, **weights)
    return found


if __name__ == "__main__":
    write()
