"""Every policy of the menu: one setting of it, how a layer with it is called, and the same by hand.

By hand is in float64, one channel of one sample at a time, from lists of the values that count; gradients are those of
autograd, with a ``detach`` where the paper stops them. Nothing of normkit is used.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from math import asin, pi, sqrt
from typing import Any

import torch
from torch import Tensor, nn

import normkit as nk

S = nk.statistics
EPS, MOMENTUM = 1e-3, 0.3
CLASSES = {0: nk.BatchNorm1d, 1: nk.BatchNorm1d, 2: nk.BatchNorm2d, 3: nk.BatchNorm3d}


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of a list; 0 and 0 of none."""
    count = max(len(values), 1)
    mean = values.sum() / count
    return mean, (values - mean).square().sum() / count


class Hand:
    """Plain batch norm, without weight and bias. Subclasses say in what they differ."""

    def __init__(self, policy: Any, channels: int) -> None:
        self.policy = policy
        self.mean, self.var = torch.zeros(channels).double(), torch.ones(channels).double()
        self.updates = 0
        self.reference: Tensor | None = None

    def train(self, x: Tensor, keep: Tensor) -> Tensor:
        y = self.normalised(x, keep, self.statistics)
        proposed = [self.observed(x.detach(), keep, channel) for channel in range(x.shape[1])]
        mean, var = (torch.stack(column) for column in zip(*proposed, strict=True))
        self.mean, self.var = self.mean.lerp(mean, MOMENTUM), self.var.lerp(var, MOMENTUM)
        self.updates += 1
        return y

    def evaluate(self, x: Tensor, keep: Tensor) -> Tensor:
        return self.normalised(x, keep, self.in_evaluation)

    def normalised(self, x: Tensor, keep: Tensor, statistics: Callable[..., Any]) -> Tensor:
        rows = []
        for sample in range(len(x)):
            row = []
            for channel in range(x.shape[1]):
                mean, var, *correction = statistics(x, keep, sample, channel)
                z = (x[sample, channel] - mean) / (var + EPS).sqrt()
                if correction:
                    z = z * correction[0] + correction[1]
                row.append(torch.where(keep[sample, channel], z, 0))
            rows.append(torch.stack(row))
        return torch.stack(rows)

    @staticmethod
    def values(x: Tensor, keep: Tensor, channel: int, samples: Any = slice(None)) -> Tensor:
        """The values that count."""
        return x[samples, channel][keep[samples, channel]]

    def statistics(self, x: Tensor, keep: Tensor, sample: int, channel: int) -> tuple[Tensor, ...]:
        """Mean, variance, and perhaps factor and offset, for one channel of one sample."""
        return moments(self.values(x, keep, channel))

    def observed(self, x: Tensor, keep: Tensor, channel: int) -> tuple[Tensor, Tensor]:
        values = self.values(x, keep, channel)
        return values.mean(), values.var(correction=1)

    def in_evaluation(self, x: Tensor, keep: Tensor, sample: int, channel: int) -> tuple[Tensor, ...]:
        return self.mean[channel], self.var[channel]


class BlendHand(Hand):
    def in_evaluation(self, x: Tensor, keep: Tensor, sample: int, channel: int) -> tuple[Tensor, ...]:
        """As the paper has it: the second moment is blended, and the square of the mean taken off."""
        values = self.values(x, keep, channel, sample)
        alpha = self.policy.alpha
        mean = alpha * moments(values)[0] + (1 - alpha) * self.mean[channel]
        square = values.square().sum() / max(len(values), 1)
        kept = self.var[channel] + self.mean[channel].square()
        return mean, alpha * square + (1 - alpha) * kept - mean.square()


class GhostHand(Hand):
    def statistics(self, x: Tensor, keep: Tensor, sample: int, channel: int) -> tuple[Tensor, ...]:
        parts = max(1, int(len(x) / self.policy.size + 0.5))
        sizes = [len(x) // parts + (part < len(x) % parts) for part in range(parts)]
        start = 0
        for size in sizes:
            if start <= sample < start + size:
                return moments(self.values(x, keep, channel, slice(start, start + size)))
            start += size
        raise AssertionError


class RunningHand(Hand):
    def statistics(self, x: Tensor, keep: Tensor, sample: int, channel: int) -> tuple[Tensor, ...]:
        return self.mean[channel], self.var[channel]


class TaperHand(Hand):
    def normalised(self, x: Tensor, keep: Tensor, statistics: Callable[..., Any]) -> Tensor:
        if statistics == self.in_evaluation:
            return super().normalised(x, keep, statistics)
        by_batch, by_running = (super(TaperHand, self).normalised(x, keep, s) for s in (statistics, self.in_evaluation))
        return self.policy.gate * by_batch + (1 - self.policy.gate) * by_running


class RenormHand(Hand):
    def statistics(self, x: Tensor, keep: Tensor, sample: int, channel: int) -> tuple[Tensor, ...]:
        warmup = self.policy.warmup
        after = max(0, self.updates - warmup)
        r_max = 1 + (self.policy.r_max - 1) * min(1, after / (7 * warmup))
        d_max = self.policy.d_max * min(1, after / (4 * warmup))
        mean, var = moments(self.values(x, keep, channel))
        deviation = (self.var[channel] + EPS).sqrt()
        r = ((var.detach() + EPS).sqrt() / deviation).clamp(1 / r_max, r_max)
        d = ((mean.detach() - self.mean[channel]) / deviation).clamp(-d_max, d_max)
        return mean, var, r, d


class VirtualHand(Hand):
    def statistics(self, x: Tensor, keep: Tensor, sample: int, channel: int) -> tuple[Tensor, ...]:
        assert self.reference is not None
        own = self.values(x, keep, channel, sample)
        return moments(torch.cat([self.reference[:, channel].flatten(), own]))

    def observed(self, x: Tensor, keep: Tensor, channel: int) -> tuple[Tensor, Tensor]:
        assert self.reference is not None
        values = self.reference[:, channel].flatten()
        return values.mean(), values.var(correction=1)

    def in_evaluation(self, x: Tensor, keep: Tensor, sample: int, channel: int) -> tuple[Tensor, ...]:
        return self.statistics(x, keep, sample, channel)


class CalibratedHand(Hand):
    """A measure of spread, times what makes its square the biased variance of normal values on average."""

    def statistics(self, x: Tensor, keep: Tensor, sample: int, channel: int) -> tuple[Tensor, ...]:
        values = self.values(x, keep, channel)
        n = len(values)
        return values.mean(), self.spread(values).square() * (1 - 1 / n) / self.expected_square(n)

    def observed(self, x: Tensor, keep: Tensor, channel: int) -> tuple[Tensor, Tensor]:
        n = len(self.values(x, keep, channel))
        mean, var = self.statistics(x, keep, 0, channel)
        return mean, var * n / (n - 1)

    def spread(self, values: Tensor) -> Tensor:
        raise NotImplementedError

    @staticmethod
    def expected_square(n: int) -> float:
        """Of the spread of n standard normal values."""
        raise NotImplementedError


class L1Hand(CalibratedHand):
    def spread(self, values: Tensor) -> Tensor:
        return (values - values.mean()).abs().mean()

    @staticmethod
    def expected_square(n: int) -> float:
        """The average of E|a||b| over all pairs of deviations: their correlation is -1 / (n - 1)."""
        rho = -1 / (n - 1)
        pair = 2 / pi * (sqrt(1 - rho * rho) + rho * asin(rho))
        return (1 - 1 / n) * (1 + (n - 1) * pair) / n


class RangeHand(CalibratedHand):
    def spread(self, values: Tensor) -> Tensor:
        return values.max() - values.min()

    @staticmethod
    @functools.cache
    def expected_square(n: int) -> float:
        """Over the joint density of least and greatest, by the midpoint rule."""
        step = 0.04
        at = torch.arange(-7, 7, step).double() + step / 2
        density, below = (-at.square() / 2).exp() / sqrt(2 * pi), torch.special.ndtr(at)
        between = (below[None] - below[:, None]).clamp(min=0) ** (n - 2)
        apart = (at[None] - at[:, None]).clamp(min=0).square()
        return n * (n - 1) * float((density[:, None] * density[None] * between * apart).sum()) * step * step


class MovingAverageHand(Hand):
    def __init__(self, policy: Any, channels: int) -> None:
        super().__init__(policy, channels)
        self.squares: list[list[Tensor]] = [[] for _ in range(channels)]
        self.products: list[list[Tensor]] = [[] for _ in range(channels)]

    def train(self, x: Tensor, keep: Tensor) -> Tensor:
        window, update = self.policy.window, self.updates + 1
        at_first = update <= window or update < self.policy.warmup
        columns, averages = [], []
        for channel in range(x.shape[1]):
            values = self.values(x, keep, channel)
            self.squares[channel].append(values.detach().square().mean())
            average = torch.stack(self.squares[channel][-1 if at_first else -window :]).mean()
            averages.append(average)
            z = torch.where(keep[:, channel], x[:, channel] / (average + EPS).sqrt(), 0)

            def backward(g: Tensor, z: Tensor = z, channel: int = channel) -> Tensor:
                z = z.detach()
                self.products[channel].append((g * z).sum() / int(keep[:, channel].sum()))
                product = torch.stack(self.products[channel][-1 if at_first else -window :]).mean()
                return g - z * product

            if z.requires_grad:
                z.register_hook(backward)
            bound = self.policy.r_max if update > max(1000, self.policy.warmup) else 1.0
            r = ((average + EPS) / (self.var[channel] + EPS)).sqrt().clamp(1 / bound, bound)
            columns.append(z * r)
        self.var = self.var.lerp(torch.stack(averages), MOMENTUM)
        self.mean = self.mean.lerp(torch.zeros_like(self.mean), MOMENTUM)
        self.updates = update
        return torch.stack(columns, 1)


@dataclass(frozen=True)
class Setting:
    """One policy as the tests use it."""

    policy: Any
    hand: type[Hand] = Hand
    keywords: dict[str, Any] = field(default_factory=dict)
    """Of every call."""
    row: int | None = None
    """Where the statistics are, in a policy with several."""
    stops: bool = False
    """The paper stops gradients, so that they are no derivative."""
    plain: bool = True
    """Evaluation is that of plain batch norm."""

    def __str__(self) -> str:
        return type(self.policy).__name__

    def layer(self, channels: int, dim: int = 2, **options: Any) -> Any:
        """Weight and bias away from 1 and 0."""
        options = {"eps": EPS, "momentum": MOMENTUM, "statistics": self.policy, **options}
        layer = CLASSES[dim](channels, **options)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
        return self.ready(layer)

    def ready(self, layer: Any) -> Any:
        if isinstance(self.policy, S.MovingAverage):
            S.bind(layer, nn.Linear(3, layer.num_features or 3))
        return layer

    def reference(self, x: Tensor) -> Tensor | None:
        """Five samples more, for the policy that asks for a reference batch; always the same."""
        if not isinstance(self.policy, S.Virtual):
            return None
        more = 2 * torch.randn((5, *x.shape[1:]), generator=torch.Generator().manual_seed(7), dtype=torch.float64) + 1
        return torch.empty_strided(more.shape, x.stride(), dtype=x.dtype).copy_(more) if len(x) else more.to(x.dtype)

    def around(self, layer: Any, x: Tensor) -> contextlib.AbstractContextManager[Any]:
        if isinstance(self.policy, S.PerDomain):
            return nk.domain(self.row)
        reference = self.reference(x)
        return contextlib.nullcontext() if reference is None else nk.reference_batch(layer, reference)

    def __call__(self, layer: Any, x: Tensor, **keywords: Any) -> Tensor:
        """The layer's output, called as the policy asks for. What has a row per sample gets rows for the reference."""
        reference = self.reference(x)
        if reference is not None:
            for name in {"mask", "residual"} & keywords.keys():
                given = keywords[name]
                keywords[name] = torch.cat([torch.ones((5, *given.shape[1:]), dtype=given.dtype), given])
        with self.around(layer, x):
            return layer(x, **self.keywords, **keywords)

    def by_hand(self, channels: int, x: Tensor) -> Hand:
        hand = self.hand(self.policy, channels)
        hand.reference = self.reference(x)
        return hand


KNOWN = (
    Setting(S.Batch()),
    Setting(S.Blend(0.3), BlendHand, plain=False),
    Setting(S.Ghost(3), GhostHand),
    Setting(S.L1(), L1Hand),
    Setting(S.MovingAverage(window=2, warmup=3), MovingAverageHand, stops=True),
    Setting(S.PerDomain(3), row=1),
    Setting(S.PerStep(3), keywords={"step": 1}, row=1),
    Setting(S.Range(), RangeHand),
    Setting(S.Renorm(r_max=3.0, d_max=5.0, warmup=1), RenormHand, stops=True),
    Setting(S.Running(), RunningHand),
    Setting(S.Synchronized(required=False)),
    Setting(S.Taper(0.3), TaperHand),
    Setting(S.Virtual(), VirtualHand, plain=False),
)
MENU = [
    getattr(S, name)
    for name in S.__all__
    if isinstance(getattr(S, name), type) and issubclass(getattr(S, name), S.Policy) and name != "Policy"
]
SETTINGS = [*KNOWN, *(Setting(cls()) for cls in MENU if cls not in {type(s.policy) for s in KNOWN})]
"""A policy that is not known here has to be plain batch norm as long as there is one process."""
