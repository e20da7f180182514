"""Every drop-in of normkit beside the torch class that it replaces; read from the registry, so that a new one joins."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normkit.layout import parse
from normkit.vocabulary.spec import REGISTRY, Spec

CHANNELS = 6
REQUIRED = {"num_features": CHANNELS, "num_channels": CHANNELS, "num_groups": 3, "normalized_shape": CHANNELS}
"""What the arguments are called that a constructor cannot do without, in torch and here."""
KEYWORD = inspect.Parameter.KEYWORD_ONLY


@dataclass(frozen=True)
class Twin:
    """A class of ours and torch's class of the same name, with the options to build both alike."""

    spec: Spec
    dim: int
    ours: type[nn.Module]
    torchs: type[nn.Module]
    lazy: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.ours.__name__, *(f"{name}={value}" for name, value in self.options.items())])

    @property
    def trailing(self) -> bool:
        """The channels are the last axis."""
        return self.spec.over is not None and parse(self.spec.over)[-1].name == "c"

    @property
    def tracks(self) -> bool:
        """It keeps running statistics."""
        return getattr(self.layer(), "track_running_stats", False)

    @property
    def mixes_samples(self) -> bool:
        return self.spec.over is not None and any(axis.pooled and axis.name == "n" for axis in parse(self.spec.over))

    def shape(self, samples: int = 5, channels: int = CHANNELS, space: tuple[int, ...] = (7, 4, 3)) -> tuple[int, ...]:
        space = space[: self.dim]
        return (samples, *space, channels) if self.trailing else (samples, channels, *space)

    def input(self, samples: int = 5, channels: int = CHANNELS, **factory: Any) -> Tensor:
        """Off-centre and off-scale, differently in every channel."""
        return off_scale(self.shape(samples, channels), -1 if self.trailing else 1, **factory)

    def required(self) -> list[int]:
        return [REQUIRED[name] for name in inspect.signature(self.torchs).parameters if name in REQUIRED]

    def pair(self, **options: Any) -> tuple[nn.Module, nn.Module]:
        """Ours and torch's with the same parameters, away from 1 and 0."""
        options = {**self.options, **options}
        ours, torchs = self.layer(**options), self.torchs(*self.required(), **options)
        with torch.no_grad():
            for mine, other in zip(ours.parameters(), torchs.parameters(), strict=True):
                other.copy_(mine.copy_(away_from_one(mine)))
        return ours, torchs

    def layer(self, **options: Any) -> nn.Module:
        return self.ours(*self.required(), **{**self.options, **options})


def off_scale(shape: tuple[int, ...], axis: int, **factory: Any) -> Tensor:
    """Normal numbers with another mean and another deviation in every slice along ``axis``."""
    size = shape[axis]
    where = [1] * len(shape)
    where[axis] = size
    scale = torch.linspace(0.5, 9.0, size).reshape(where)
    return (scale * torch.randn(shape) + torch.linspace(-20.0, 40.0, size).reshape(where)).to(**factory)


def away_from_one(parameter: Tensor) -> Tensor:
    return parameter.detach() + 0.5 * torch.randn(parameter.shape).to(parameter)


def torch_class(spec: Spec, dim: int, *, lazy: bool = False) -> type[nn.Module]:
    """``"torch.nn.BatchNorm{dim}d"`` -> ``torch.nn.BatchNorm2d``, or its lazy variant."""
    assert spec.twin is not None
    name = spec.twin.format(dim=dim).removeprefix("torch.nn.")
    return getattr(nn, f"Lazy{name}" if lazy else name)


def twins(*, lazy: bool = False) -> Iterator[Twin]:
    for family in REGISTRY.values():
        if family.spec.twin is not None:
            for dim, cls in sorted((family.lazy if lazy else family.classes).items(), key=str):
                yield Twin(family.spec, dim or 2, cls, torch_class(family.spec, dim or 2, lazy=lazy), lazy)


def variants(twin: Twin) -> Iterator[Twin]:
    """The twin with every combination of the switches of torch's constructor."""
    parameters = inspect.signature(twin.torchs).parameters.values()
    switches = [parameter.name for parameter in parameters if isinstance(parameter.default, bool)]
    for values in itertools.product((True, False), repeat=len(switches)):
        yield Twin(twin.spec, twin.dim, twin.ours, twin.torchs, twin.lazy, dict(zip(switches, values, strict=True)))


TWINS = tuple(twins())
LAZY = tuple(twins(lazy=True))
VARIANTS = tuple(variant for twin in TWINS for variant in variants(twin))
TRACKING = tuple(twin for twin in VARIANTS if twin.tracks)


def step(layer: nn.Module, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """All that one training or evaluation step gives, by name."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(upstream)
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in layer.named_parameters()}
    buffers = {name: copy.deepcopy(buffer) for name, buffer in layer.state_dict().items()}
    return {"output": y.detach(), "gradient of input": x.grad, **gradients, **buffers}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Bit for bit, NaN included."""
    assert list(got) == list(wanted)
    for name, value in got.items():
        torch.testing.assert_close(
            value, wanted[name], rtol=0, atol=0, equal_nan=True, msg=functools.partial("{}: {}".format, name)
        )
