"""Your own network and data in `normkit compare`.

    normkit compare examples/compare_own_experiment.py:spirals --quick
    normkit compare examples/compare_own_experiment.py:spirals --arms 'none, batch, layer, batch+dropout:0.1'
    normkit compare examples/compare_own_experiment.py:spirals --norms none,batch --sweep turns=1,2,3

A function returns an `Experiment`. What it needs from you: a model builder that takes `norm_layer`, data, and a target
that you fix before you see a result. The parameters of the function are options: `--set turns=3` and
`--sweep turns=1,2,3`.
"""

from __future__ import annotations

import math

import torch
from torch import nn

import normkit as nk


def spirals(turns: float = 1.5) -> nk.lab.Experiment:
    """Two spirals that a small network has to tell apart; more turns are harder."""
    return nk.lab.Experiment(
        name="spirals",
        title=f"Two spirals of {turns:g} turns, 4 x 32 tanh network",
        model=model,
        data=lambda seed: data(turns, seed),
        target=0.95,  # fixed beforehand: chance is 0.5, and the noise leaves room for 0.99
        steps=1500,
        quick_steps=800,
        eval_every=10,
        batch_size=64,
    )


def model(norm_layer, dropout: float = 0.0, placement: str = "before") -> nn.Module:
    """`norm_layer(num_features)` builds the norm of an arm; `dropout` and `placement` are for arms that have them."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((2, 32), (32, 32), (32, 32), (32, 32)):
        norm = norm_layer(outputs)
        layers.append(nn.Linear(inputs, outputs))
        layers += [norm, nn.Tanh()] if placement == "before" else [nn.Tanh(), norm]
        layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear(32, 2))


def data(turns: float, seed: int):
    """(train, validation, test), each a pair of tensors; datasets and DataLoaders do as well."""
    return tuple(points(turns, count, seed + offset) for count, offset in ((512, 0), (256, 10_000), (1024, 20_000)))


def points(turns: float, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    along = torch.rand(count, generator=generator).sqrt()
    label = torch.arange(count) % 2
    angle = 2 * math.pi * turns * along + math.pi * label
    noise = 0.02 * torch.randn(count, 2, generator=generator)
    return 2 * torch.stack([along * angle.cos(), along * angle.sin()], 1) + noise, label
