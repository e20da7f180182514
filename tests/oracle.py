"""What a norm must give: the truth in float64, and how far rounding alone can lead away from it.

The truth is the layer itself in float64 on the reference backend, with the epilogue written by hand. The bound follows
the conditioning of the input. Forward, with u the epsilon of the storage and e that of the arithmetic (float32 or
better), sigma = sqrt(var + eps) and the largest |x| of those that share it:

    u * |y|  +  4 * e * (1 + max|x| / sigma) * (|weight| + |bias| + 1)

The mean is known to e * max|x|, which is e * max|x| / sigma of the normalised value; 4 covers the four operations of
which each adds about one such error. Backward, the same error of the normalised value enters the three terms of the
gradient. A norm that pools nothing is a chain of operators in the storage type: there e is u and nothing is amplified.
Where no pattern says what is pooled, nothing is known of the conditioning, and it is measured: the truth is found again
for numbers that are off by a random part of e, and ``OFTEN`` times the root mean square of what that changes is added.
``arithmetic`` sets e for an implementation that keeps its statistics in something narrower than float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import normkit as nk
from normkit.dispatch import BACKENDS
from normkit.epilogue import activation_module
from normkit.explanation import recorded

OPERATIONS = 4
PROBES, NUDGE = 6, 2.0**-24
OFTEN = 16
"""How many roundings may meet in one number, each as large as a probe's. The root mean square of six normal numbers is
below a sixteenth of their deviation once in some four million."""
STEEPEST = 1.13
"""The largest slope of an activation that we have (gelu)."""
CURVIEST = 0.8
"""The largest second derivative (gelu); the kinks of relu and leaky_relu are kept out by ``upstream_for``."""


@dataclass(frozen=True)
class Expected:
    """The truth, and the bound on an honest error, element by element."""

    value: Tensor
    bound: Tensor


def assert_matches(got: Tensor | None, expected: Expected, what: str) -> None:
    """Raise AssertionError, with the worst element, unless ``got`` is within the bound everywhere."""
    if got is None:
        raise AssertionError(f"{what}: nothing came back")
    if got.shape != expected.value.shape:
        raise AssertionError(f"{what}: shape {tuple(got.shape)} instead of {tuple(expected.value.shape)}")
    limit = torch.finfo(got.dtype).max if got.is_floating_point() else torch.inf  # beyond it, infinity is right
    excess = (got.double().clamp(-limit, limit) - expected.value.clamp(-limit, limit)).abs() - expected.bound
    wrong = ~(excess <= 0)  # also where anything is NaN
    if wrong.any():
        worst = int(torch.where(excess.isnan(), torch.inf, excess).argmax())
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), got.shape))
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements are wrong; the worst is {place}: "
            f"{got[place].item():.9g} instead of {expected.value[place].item():.9g}, "
            f"allowed is a difference of {expected.bound[place].item():.2g}"
        )


def observe(layer: nn.Module, x: Tensor, residual: Tensor | None, upstream: Tensor) -> dict[str, Tensor | None]:
    """What the layer gives: output, gradients, running statistics."""
    x = x.detach().requires_grad_()
    residual = None if residual is None else residual.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x, residual=residual)
    if y.dtype != x.dtype:
        raise AssertionError(f"output: {y.dtype} from an input in {x.dtype}")
    y.backward(upstream)
    seen = {"output": y.detach(), "gradient of input": x.grad}
    if residual is not None:
        seen["gradient of residual"] = residual.grad
    for name, parameter in layer.named_parameters():
        seen[f"gradient of {name}"] = parameter.grad
        if parameter.grad is not None and parameter.grad.dtype != parameter.dtype:
            raise AssertionError(f"gradient of {name}: {parameter.grad.dtype}, the parameter is {parameter.dtype}")
    return seen | {name: getattr(layer, name) for name in running_statistics(layer)}


def running_statistics(layer: nn.Module) -> list[str]:
    return [name for name in ("running_mean", "running_var") if getattr(layer, name, None) is not None]


def known_statistics(layer: nn.Module) -> list[Tensor]:
    """Mean and variance (or 0 and the mean square) by which evaluation normalises."""
    square = getattr(layer, "running_square", None)
    if square is not None:
        return [torch.zeros_like(square), square]
    return [getattr(layer, name) for name in running_statistics(layer)]


def refusal(backend: str, layer: nn.Module, x: Tensor, residual: Tensor | None = None) -> str:
    """Why a backend does not take this input; empty: it does. The reference takes whatever it is asked for."""
    call = recorded(layer, x.detach().requires_grad_(), residual=residual)
    return "" if backend == "reference" else "; ".join(BACKENDS[backend].reasons_against(call))


def examine(
    layer: nn.Module, x: Tensor, residual: Tensor | None = None, *, arithmetic: torch.dtype = torch.float32
) -> None:
    """Raise AssertionError unless output, gradients and running statistics of ``layer`` agree with the truth."""
    truth = Truth(layer, x, residual, arithmetic)
    upstream = truth.upstream()
    expected = truth.expected(upstream)
    seen = observe(layer, x, residual, upstream)
    if set(seen) != set(expected):
        raise AssertionError(f"seen {sorted(seen)}, expected {sorted(expected)}")
    for what, value in expected.items():
        assert_matches(seen[what], value, what)


class Truth:
    """The layer on ``x`` in float64, before anything is known of the layer's own arithmetic."""

    def __init__(
        self, layer: nn.Module, x: Tensor, residual: Tensor | None = None, arithmetic: torch.dtype = torch.float32
    ) -> None:
        wide, least = torch.finfo(torch.promote_types(x.dtype, torch.float32)), torch.finfo(x.dtype)
        self.dtype = x.dtype
        self.storage = least.eps
        self.last_bit = least.smallest_normal * least.eps  # the spacing of the numbers around 0
        self.buffers = wide.eps
        self.arithmetic = torch.finfo(torch.promote_types(x.dtype, arithmetic)).eps
        self.layer = copy.deepcopy(layer).double()
        self.layer.activation, self.layer.backend = None, "reference"
        if getattr(self.layer, "eps", 0.0) is None:
            self.layer.eps = wide.eps  # the default of RMS norm follows the type
        self.activation = copy.deepcopy(activation_module(layer.activation))
        self.x = x.detach().double().requires_grad_()
        self.residual = None if residual is None else residual.detach().double().requires_grad_()
        self.problem = nk.explain(self.layer, self.x).problem
        self.pooled = () if self.problem is None or not self.problem.training else self.problem.pooled
        self.wide = wide.eps
        self.mixes = self.problem is None and not {"sample", "channel"} <= layer.spec.laws
        self._measure()  # before the forward pass moves the running statistics
        self.conditioning = self._sensitivity(lambda affine, *_: [affine])[0] if self.mixes else 0.0
        self.affine = self.layer(self.x)
        if self.mixes:
            self.condition = self.affine.detach().abs()
        self.sum = self.affine if self.residual is None else self.affine + self.residual
        self.output = self.sum if self.activation is None else self.activation(self.sum)

    def _measure(self) -> None:
        """Normalised input, 1 / sigma, conditioning and epsilon of the arithmetic, opened as the pattern says."""
        x = self.x.detach()
        if self.problem is None:
            self.normalised, self.rstd, self.condition = x, torch.ones_like(x), torch.zeros_like(x)
            self.arithmetic = self.wide if self.mixes else self.storage
            return
        x, eps = x.reshape(self.problem.view), self.layer.eps
        if self.pooled:
            mean = self._mean(x) if self.problem.center else torch.zeros_like(self._mean(x))
            self.rstd = (self._mean((x - mean).square()) + eps).rsqrt()
            largest = x.abs().amax(self.pooled, keepdim=True) if x.numel() else mean
        else:
            mean, var = (t.reshape(self._weight_view()) for t in known_statistics(self.layer))
            self.rstd = (var + eps).rsqrt()
            largest = x.abs() + mean.abs()
        self.normalised = (x - mean) * self.rstd
        self.condition = largest * self.rstd

    def _sensitivity(self, observed: Callable[..., Iterable[Tensor]]) -> list[Tensor]:
        """How far what is observed may be off where every number that enters may be by a rounding."""
        generator = torch.Generator().manual_seed(0)
        nudged = lambda t: t.detach() * (1 + NUDGE * torch.randn(t.shape, dtype=t.dtype, generator=generator))
        exact = self._again(observed, lambda t: t.detach().clone())
        others = zip(*(self._again(observed, nudged) for _ in range(PROBES)), strict=True)
        off = [torch.stack(found) - value for found, value in zip(others, exact, strict=True)]
        return [OFTEN * self.wide / NUDGE * probes.square().mean(0).sqrt() for probes in off]

    def _again(self, observed: Callable[..., Iterable[Tensor]], enter: Callable[[Tensor], Tensor]) -> list[Tensor]:
        layer, x = copy.deepcopy(self.layer), enter(self.x).requires_grad_()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(enter(parameter))
        return [t.detach() for t in observed(layer(x), [x, *layer.parameters()], enter)]

    def _mean(self, x: Tensor) -> Tensor:
        """Over the values that share their statistics; 0 where none do."""
        return x.mean(self.pooled, keepdim=True) if self.pooled else torch.zeros_like(x)

    def _weight_view(self) -> list[int]:
        weighted, view = self.problem.weighted, self.problem.view
        return [size if axis in weighted else 1 for axis, size in enumerate(view)]

    def _parameter(self, name: str, otherwise: float) -> Tensor:
        """|weight| or |bias|, so that it broadcasts against the opened input."""
        parameter = getattr(self.layer, name, None)
        if parameter is None:
            return torch.tensor(otherwise, dtype=torch.float64)
        return self._spread(parameter.detach().abs())

    def _spread(self, parameter: Tensor) -> Tensor:
        """A parameter so that it broadcasts against the opened input."""
        if self.problem is not None:
            return parameter.reshape(self._weight_view())
        first = getattr(self.layer, "channels_first", True)
        return parameter.reshape(-1, *[1] * (self.x.dim() - 2)) if first else parameter

    def _over_parameter(self, terms: Tensor, parameter: Tensor) -> Tensor:
        """The sum of all terms that meet in one element of a parameter: what autograd does for a broadcast."""
        weight = getattr(self.layer, "weight", None)
        if weight is None or parameter.shape != weight.shape:  # of the whole layer
            return terms.sum().expand(parameter.shape)
        stretched = torch.zeros_like(parameter, requires_grad=True)
        return torch.autograd.grad((terms * self._spread(stretched)).sum(), stretched)[0]

    def _bounds(self) -> Iterator[Tensor]:
        """Of the affine step, of the sum with the residual, of the activation."""
        size = self._parameter("weight", 1.0) + self._parameter("bias", 0.0) + 1
        arithmetic = OPERATIONS * self.arithmetic * (1 + self.condition) * size
        affine = (
            self.last_bit
            + self.storage * self.affine.detach().abs()
            + arithmetic.expand_as(self.normalised).reshape(self.x.shape)
            + self.conditioning
        )
        yield affine
        total = affine if self.residual is None else affine + self.storage * self.sum.detach().abs()
        yield total
        yield total if self.activation is None else STEEPEST * total + self.storage * self.output.detach().abs()

    def upstream(self) -> Tensor:
        """A random gradient of the output; 0 where rounding decides on which side of a kink the sum lies."""
        _, total, _ = self._bounds()
        upstream = torch.randn(self.x.shape, dtype=torch.float64).to(self.dtype)
        return upstream.where(self.sum.detach().abs() > total, 0) if self.activation is not None else upstream

    def expected(self, upstream: Tensor) -> dict[str, Expected]:
        """By name, all that ``observe`` sees."""
        _, total, output = self._bounds()
        found = {"output": Expected(self.output.detach(), output)}
        parameters = dict(self.layer.named_parameters())
        wanted = {"gradient of input": self.x, **{f"gradient of {name}": value for name, value in parameters.items()}}
        if self.residual is not None:
            wanted["gradient of residual"] = self.residual
        leaves = [self.sum, *wanted.values()]
        of_sum, *gradients = torch.autograd.grad(self.output, leaves, upstream.double(), materialize_grads=True)
        slack = torch.zeros_like(of_sum)
        if self.activation is not None:
            slack = self.storage * of_sum.abs() + CURVIEST * upstream.double().abs() * total
        measured = self._sensitivity_of_gradients(of_sum, slack)
        for (what, leaf), value in zip(wanted.items(), gradients, strict=True):
            if what == "gradient of input":
                bound = self._bound_of_input(of_sum, slack)
            elif what == "gradient of residual":
                bound = slack
            else:
                bound = self._bound_of_parameter(what.rpartition(" ")[2], leaf, of_sum, slack)
            bound = bound + measured.get(what, 0.0)
            found[what] = Expected(value, self.last_bit + self.storage * value.abs() + bound)
        return found | self._expected_statistics()

    def _sensitivity_of_gradients(self, of_sum: Tensor, slack: Tensor) -> dict[str, Tensor]:
        """By name; ``slack`` is how far the upstream gradient may be off."""
        if not self.mixes:
            return {}
        share = slack / self.wide

        def gradients(affine: Tensor, leaves: list[Tensor], enter: Callable[[Tensor], Tensor]) -> Iterable[Tensor]:
            upstream = enter(of_sum) + (enter(share) - share)
            return torch.autograd.grad(affine, leaves, upstream, materialize_grads=True)

        names = ["input", *dict(self.layer.named_parameters())]
        found = self._sensitivity(gradients)
        return {f"gradient of {name}": bound for name, bound in zip(names, found, strict=True)}

    def _bound_of_input(self, of_sum: Tensor, slack: Tensor) -> Tensor:
        """Of rstd * (g - mean(g) - xhat * mean(g * xhat)), where g is the gradient of the normalised value."""
        weight, size = self._parameter("weight", 1.0), 1 + self.normalised.abs()
        g, slack = weight * of_sum.reshape(size.shape).abs(), weight * slack.reshape(size.shape)
        arithmetic = OPERATIONS * self.arithmetic * (1 + self.condition)
        if self.problem is None:
            return arithmetic * g * size + slack * size
        inherited = slack + self._mean(slack) + size * self._mean(slack * size)
        own = arithmetic * (g + self._mean(g) + size * self._mean(g * size))
        return (self.rstd * (inherited + own)).reshape(self.x.shape)

    def _bound_of_parameter(self, name: str, parameter: Tensor, of_sum: Tensor, slack: Tensor) -> Tensor:
        """A sum over everything that meets the parameter: as many errors as terms."""
        arithmetic = OPERATIONS * self.arithmetic
        g, slack = of_sum.reshape(self.normalised.shape).abs(), slack.reshape(self.normalised.shape)
        if name == "bias":
            return self._over_parameter(arithmetic * g + slack, parameter)
        size = 1 + self.normalised.abs()
        if name != "weight":
            size = size * (1 + self._parameter("weight", 1.0))
        return self._over_parameter((arithmetic * (1 + self.condition) * g + slack) * size, parameter)

    def _expected_statistics(self) -> dict[str, Expected]:
        """Running statistics after this step: float32 or better whatever the input is."""
        names = running_statistics(self.layer)
        channels = tuple(axis for axis in range(self.x.dim()) if axis != 1)
        moved = self.layer.training if self.mixes else self.pooled
        if not names or not moved or not self.x.numel():
            return {name: Expected(value := getattr(self.layer, name), torch.zeros_like(value)) for name in names}
        if self.mixes:
            sigma, values = self.x.detach().var(channels, correction=0).sqrt(), self.x.numel() // self.x.shape[1]
        else:
            sigma, values = (1 / self.rstd).reshape(-1, self.x.shape[1]).amax(0), self.problem.values
        largest = self.x.detach().abs().amax(channels)
        step = OPERATIONS * self.buffers
        mean, var = (getattr(self.layer, name) for name in names)
        scale = values / max(values - 1, 1)
        return {
            "running_mean": Expected(mean, step * (largest + mean.abs())),
            "running_var": Expected(var, step * (scale * sigma * (sigma + largest) + var)),
        }
