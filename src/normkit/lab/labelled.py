"""Labelled samples for classification, and how they become train, validation and test data for one seed.

The test samples are fixed: a search for a learning rate, whatever its seed, never sees one. Training and validation
samples change places with the seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normkit.lab.data import Data, as_data, permutation
from normkit.lab.errors import LabError

MOST_VALIDATION = 2000  # an evaluation every few steps must not dominate; 2000 samples resolve half a percent
SMALLEST = 20


@dataclass(frozen=True)
class Labelled:
    """x: (n, features) or images (n, c, h, w), float32; y: (n,) int64 below `classes`; test: the same, or None."""

    x: Tensor
    y: Tensor
    classes: int
    test: tuple[Tensor, Tensor] | None = None
    name: str = ""

    @property
    def is_image(self) -> bool:
        return self.x.ndim == 4

    @property
    def features(self) -> int:
        return self.x[0].numel()


def hold_out(x: Tensor, y: Tensor, classes: int, name: str, count: int | None = None) -> Labelled:
    """Sets `count` samples (default a quarter) aside as test data, the same ones whatever the seed of a run."""
    if len(x) < SMALLEST:
        raise LabError(
            f"{name}: {len(x)} samples are too few for training, validation and test; give {SMALLEST} or more"
        )
    count = count or len(x) // 4
    order = permutation(len(x), 0, f"test of {len(x)}")
    test, rest = order[:count], order[count:]
    return Labelled(x[rest], y[rest], classes, (x[test], y[test]), name)


def split(source: Labelled, seed: int, validation: int | None = None, layout: str = "flat") -> Data:
    """Train, validation and test data of one seed, standardised by the mean and deviation of the training part.

    Images are standardised per channel, vectors per feature. layout: "flat" (n, features), "image" (n, c, h, w),
    "rows" (n, h, c * w) or "pixels" (n, h * w, c): a row or a pixel of an image is one element of a sequence.
    """
    assert source.test is not None
    count = validation or min(max(1, len(source.x) // 5), MOST_VALIDATION)
    order = permutation(len(source.x), seed, "split")
    held, train = order[:count], order[count:]
    mean, deviation = _moments(source.x[train])
    parts = [(source.x[train], source.y[train]), (source.x[held], source.y[held]), source.test]
    return as_data(tuple((_LAYOUTS[layout]((x - mean) / deviation), y) for x, y in parts), source.name)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    axes = (0, 2, 3) if x.ndim == 4 else (0,)
    deviation, mean = torch.std_mean(x, axes, correction=0, keepdim=True)
    return mean, torch.where(deviation > 0, deviation, 1.0)  # a constant feature stays constant instead of nan


_LAYOUTS = {
    "flat": lambda x: x.flatten(1),
    "image": lambda x: x,
    "rows": lambda x: x.permute(0, 2, 1, 3).flatten(2),
    "pixels": lambda x: x.flatten(2).mT,
}
