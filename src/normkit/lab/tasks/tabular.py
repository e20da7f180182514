"""tabular: a small perceptron on scikit-learn's breast-cancer table."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from normkit.lab import initial
from normkit.lab.experiment import SGD_RATES, Experiment
from normkit.lab.labelled import split
from normkit.lab.tasks.perceptron import perceptron
from normkit.lab.tasks.samples import cancer

# Fixed by a pilot before any comparison (1 search and 3 final seeds, all four norms): with 114 validation samples 96 %
# (110 right) is out of reach for one seed in three whatever the norm; 95 % (109 right) is reached by every arm.
TARGET = 0.95


def tabular(data: str | None = None, depth: int = 3, width: int = 32) -> Experiment:
    """`depth` hidden layers of `width` ReLU units on 30 standardised features; 341 training samples."""
    source, validation = cancer(data)
    sizes = [source.features, *[width] * depth, source.classes]

    def model(norm_layer: Callable[[int], nn.Module], dropout: float = 0.0, placement: str = "before") -> nn.Module:
        return perceptron(norm_layer, sizes, nn.ReLU, dropout, placement)

    return Experiment(
        name="tabular",
        title=f"{depth} x {width} ReLU network on {source.name}",
        description=(
            f"A multilayer perceptron with {depth} hidden layers of {width} ReLU units tells {source.classes} classes "
            f"of {source.name} apart by {source.features} features, each standardised on the training part. He's "
            "initial weights. Small data: one validation sample is almost one percent."
        ),
        model=model,
        data=lambda seed: split(source, seed, validation),
        target=TARGET,
        rates=SGD_RATES,
        steps=500,
        eval_every=2,
        batch_size=32,
        initial=initial.he,
    )
