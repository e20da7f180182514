"""digits: the network of Ioffe & Szegedy 2015, section 4.1 (arXiv:1502.03167), on scikit-learn's digits."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from normkit.lab import initial
from normkit.lab.experiment import SGD_RATES, Experiment
from normkit.lab.labelled import split
from normkit.lab.tasks.perceptron import perceptron
from normkit.lab.tasks.samples import digits as load

# Fixed by a pilot before any comparison (2 seeds, all four norms): 90 % is reached too fast to resolve a ratio at one
# evaluation every few steps, 97 % is out of reach for the plain network; at 95 % every arm has a rate that gets there.
TARGET = 0.95


def digits(data: str | None = None, depth: int = 3, width: int = 100) -> Experiment:
    """`depth` hidden layers of `width` sigmoid units, 60 samples per step, norm before the activation."""
    return _digits("digits", nn.Sigmoid, initial.glorot, 2000, data, depth, width)


def digits_relu(data: str | None = None, depth: int = 3, width: int = 100) -> Experiment:
    """The same network with ReLU and He's initial weights."""
    return _digits("digits-relu", nn.ReLU, initial.he, 800, data, depth, width)


def _digits(
    name: str,
    activation: type[nn.Module],
    weights: Callable[..., None],
    steps: int,
    data: str | None,
    depth: int,
    width: int,
) -> Experiment:
    source, validation = load(data)
    sizes = [source.features, *[width] * depth, source.classes]

    def model(norm_layer: Callable[[int], nn.Module], dropout: float = 0.0, placement: str = "before") -> nn.Module:
        return perceptron(norm_layer, sizes, activation, dropout, placement)

    return Experiment(
        name=name,
        title=f"{depth} x {width} {activation.__name__.lower()} network on {source.name or 'digits'}",
        description=(
            f"A multilayer perceptron with {depth} hidden layers of {width} {activation.__name__.lower()} units, as in "
            f"Ioffe & Szegedy 2015 section 4.1, classifies {source.name} ({len(source.x)} samples for training and "
            f"validation, {len(source.test[0]) if source.test else 0} for testing). Initial weights: "
            f"{weights.__doc__.split(':')[0] if weights.__doc__ else ''}."
        ),
        model=model,
        data=lambda seed: split(source, seed, validation),
        target=TARGET,
        rates=SGD_RATES,
        steps=steps,
        quick_steps=2 * steps // 5,
        eval_every=steps // 400,
        batch_size=60,
        initial=weights,
    )
