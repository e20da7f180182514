"""How good generated samples are: the Fréchet distance of features, and which modes of the data they cover."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

COVERED = 0.2
"""A mode is covered by this part of its fair share of the samples: of 8 modes 2.5 %, of 10 modes 2 %."""
COLLAPSED = 0.5
"""Collapsed: fewer than this part of the modes are covered."""


@dataclass(frozen=True)
class Modes:
    """The modes of a data set; assign: samples (n, ...) to the mode of each (n,), -1 for one that belongs to none."""

    count: int
    assign: Callable[[Tensor], Tensor]

    def shares(self, samples: Tensor) -> Tensor:
        """The share of the samples in each mode, (count,)."""
        found = self.assign(samples)
        return torch.bincount(found[found >= 0], minlength=self.count).double() / len(samples)

    def covered(self, samples: Tensor) -> int:
        """How many modes have at least `COVERED` of their fair share."""
        return int((self.shares(samples) >= COVERED / self.count).sum())

    def overlap(self, samples: Tensor) -> float:
        """1 less the total variation distance between the shares and equal ones: samples of no mode are lost."""
        return float(self.shares(samples).clamp(max=1 / self.count).sum())


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Of the normal distributions with the moments of two sets of features (n, d) and (m, d); nan for nan and inf.

    ``|mean1 - mean2|^2 + trace(cov1 + cov2 - 2 (cov1 cov2)^(1/2))``, in float64 (Heusel et al. 2017, arXiv:1706.08500).
    Few samples make it larger, so compare it with that of as many real samples.
    """
    if not (bool(torch.isfinite(first).all()) and bool(torch.isfinite(second).all())):
        return math.nan
    means, covariances = zip(*((x.double().mean(0), x.double().T.cov()) for x in (first, second)), strict=True)
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # trace((AB)^(1/2)) is that of (A^(1/2) B A^(1/2))^(1/2)
    shared = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    apart = (means[0] - means[1]).square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * shared
    return max(0.0, float(apart))


def distance_of_means(samples: Tensor, real: Tensor) -> Tensor:
    """Squared distance between the mean sample and the mean real one: what is logged as the loss on validation data."""
    return (samples.mean(0) - real.mean(0)).square().sum()
