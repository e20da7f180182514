"""Experiments small enough to be run whole by a test, loaded as a user's own file would be."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from normkit.lab import Experiment

PATH = Path(__file__)
MARK = torch.tensor(12.5)
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def data(seed: int = 0, samples: int = 64):
    """Two classes of points (6 features) that a line separates: train, validation and test."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 6, generator=generator) * 3 + 1
    y = (x.sum(1) > 6).long()
    half = samples // 2
    return (x[:half], y[:half]), (x[half:-8], y[half:-8]), (x[-8:], y[-8:])


def model(norm_layer, dropout: float = 0.0, placement: str = "before", width: int = 8):
    norm = norm_layer(width)
    middle = [norm, nn.ReLU()] if placement == "before" else [nn.ReLU(), norm]
    return nn.Sequential(nn.Linear(6, width), *middle, nn.Dropout(dropout), nn.Linear(width, 2))


def tiny(steps: int = 12, target: float = 0.8, width: int = 8) -> Experiment:
    return Experiment(
        name="tiny",
        model=lambda norm_layer, dropout=0.0, placement="before": model(norm_layer, dropout, placement, width),
        data=data,
        target=target,
        arms=("none", "batch"),
        rates=RATES,
        steps=steps,
        eval_every=4,
        batch_size=16,
    )


class CrashesInTraining(nn.Module):
    """A network whose batch-norm arm raises at its third step."""

    def __init__(self, norm_layer):
        super().__init__()
        self.layers = model(norm_layer)
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        if self.calls > 2 and any(isinstance(m, nn.BatchNorm1d) for m in self.modules()):
            raise RuntimeError("the third step is one too many")
        return self.layers(x)


def crashing() -> Experiment:
    return Experiment(name="crashing", model=CrashesInTraining, data=data, target=0.8, arms=("none", "batch"),
                      rates=RATES, steps=12, eval_every=4, batch_size=16)  # fmt: skip


class KillsItsProcess(nn.Module):
    """A network whose batch-norm arm kills its own process when it meets the data of seed 0."""

    def __init__(self, norm_layer):
        super().__init__()
        self.layers = model(norm_layer)

    def forward(self, x):
        if torch.equal(x.max(), MARK) and any(isinstance(m, nn.BatchNorm1d) for m in self.modules()):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.layers(x)


def deadly() -> Experiment:
    def marked(seed: int):
        parts = data(seed)
        if seed == 0:
            parts[0][0][:, 0] = MARK
        return parts

    return Experiment(name="deadly", model=KillsItsProcess, data=marked, target=0.0, arms=("none", "batch"),
                      rates=(*RATES[:-1], 0.001), steps=12, eval_every=4, batch_size=16)  # fmt: skip


def diverging() -> Experiment:
    """A linear model that no rate of the grid can train: the loss grows without bound."""
    inputs = torch.linspace(1, 2, 32).unsqueeze(1) * 100
    pairs = (inputs, inputs * 2)
    return Experiment(name="diverging", model=lambda norm_layer: nn.Sequential(nn.Linear(1, 1), norm_layer(1)),
                      data=(pairs, pairs, pairs), target=0.0, loss=nn.functional.mse_loss, arms=("none",),
                      rates=[10.0**k for k in range(7)], steps=12, eval_every=4, batch_size=16,
                      metric=mean_squares())  # fmt: skip


def no_data() -> Experiment:
    return replace(tiny(), name="no_data", data=lambda seed: data(seed // 0))


class Broken(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        raise KeyError("sample 3")


def broken_dataset() -> Experiment:
    return replace(tiny(), name="broken_dataset", data=(Broken(), Broken(), Broken()))


def mean_squares():
    from normkit.lab import Metric

    return Metric("mean square", nn.functional.mse_loss, higher_is_better=False, unit="")


def not_an_experiment() -> int:
    return 3


def raises() -> Experiment:
    raise KeyError("where are my data?")


def ignores_norms() -> Experiment:
    return Experiment(name="ignores", model=lambda norm_layer: nn.Linear(6, 2), data=data, target=0.8, rates=RATES)


def takes_no_dropout() -> Experiment:
    return Experiment(name="bare", model=lambda norm_layer: model(norm_layer), data=data, target=0.8, rates=RATES)
