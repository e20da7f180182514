"""Scale and shift per channel so that a layer of another kind gives, as nearly as it can, what the old one gave.

The layers are fitted in one run, each behind those that have been fitted already: what a layer cannot follow, the next
one sees, and makes up for as far as it can. Least squares, in float64.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normkit.moments import Moments
from normkit.norm import Norm
from normkit.surgery import batches, probe
from normkit.surgery.collect import moments_of

_ALPHAS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.3, 1.7)
"""Slopes that are tried for a learned saturation (DyT, Derf), in units of 1 / deviation of the input.

Smaller ones would agree better still with a batch norm in evaluation, by saturating nowhere.
"""
Run = Callable[[nn.Module], Any]


@dataclass
class Match:
    """How one new layer does on a batch that it was not fitted on."""

    fitted: float
    """Root mean square error of its output, in standard deviations of the old layer's output."""
    carried: float
    """The same with weight and bias as they were."""


@dataclass
class Matched:
    """What came of fitting a model."""

    layers: dict[nn.Module, Match] = field(default_factory=dict)
    """By the old layer; those that no batch came by are missing."""
    fitted: float = 0.0
    """Of the outputs of the model."""
    carried: float = 0.0


def two_runs(match: Any, call: batches.Call | None) -> tuple[Run, Run]:
    """How to run a model on what is fitted, and on what the error is measured on.

    A tensor, a tuple of positional or a dict of keyword arguments is cut in two halves; of any other iterable the first
    two batches are taken, as loaders give them.

    Raises:
        ValueError: a single sample, or an iterable without two batches.
    """
    if isinstance(match, Tensor | tuple | Mapping):
        run = call or _directly
        first, second = _halves(match)
        return (lambda model: run(model, first)), (lambda model: run(model, second))
    iterator = iter(match)
    taken = [batch for batch, _ in zip(iterator, range(2), strict=False)]
    if len(taken) < 2:
        raise ValueError(
            f"convert_: match= has {len(taken)} batches, and it takes two: one to fit on, another to measure the error "
            "on.\n  give a DataLoader with two batches or more, or one batch as a tensor, which is cut in two"
        )
    run = call or batches.call
    return (lambda model: run(model, taken[0])), (lambda model: run(model, taken[1]))


def _directly(model: nn.Module, example_inputs: Any) -> Any:
    args, kwargs = probe.arguments(example_inputs)
    return model(*args, **kwargs)


def _halves(match: Any) -> tuple[Any, Any]:
    sizes = [leaf.shape[0] for leaf in pytree.tree_leaves(match) if isinstance(leaf, Tensor) and leaf.dim()]
    number = sizes[0] if sizes else 0
    if number < 2:
        raise ValueError(
            f"convert_: match= has {number} samples, and it is cut in two: one half to fit on, the other to measure "
            "the error on.\n  give a batch of two samples or more, samples on the first axis"
        )
    cut = lambda part: lambda leaf: leaf[part] if isinstance(leaf, Tensor) and leaf.shape[:1] == (number,) else leaf
    return tuple(pytree.tree_map(cut(part), match) for part in (slice(number // 2), slice(number // 2, None)))


def fit(model: nn.Module, fresh: dict[nn.Module, nn.Module], keep: set[nn.Module], runs: tuple[Run, Run]) -> Matched:
    """Fit the new layers in place of the old ones, as they stand in the model. The model itself is not changed.

    Args:
        model: with the old layers.
        fresh: old layer -> new layer.
        keep: old layers whose weight and bias are carried over, because they belong to another layer too.
        runs: of :func:`two_runs`.
    """
    carried = {old: copy.deepcopy(new) for old, new in fresh.items()}
    modes = {new: new.training for new in fresh.values()}
    with probe.restored(model), torch.no_grad():
        for module in (model, *fresh.values(), *carried.values()):
            module.eval()
        _, wanted = _run_old(model, fresh, runs[0])
        _run_new(model, fresh, runs[0], _Fit(wanted, keep))
        _run_new(model, carried, runs[0], _Fill())
        output, wanted = _run_old(model, fresh, runs[1])
        found = Matched()
        errors = []
        for layers in (fresh, carried):
            new_output, now = _run_new(model, layers, runs[1])
            errors.append({old: _error(now[old], wanted[old]) for old in now})
            error = _error(*(([t for t in pytree.tree_leaves(o) if _floats(t)]) for o in (new_output, output)))
            found.fitted, found.carried = (error, 0.0) if layers is fresh else (found.fitted, error)
        found.layers = {old: Match(errors[0][old], errors[1][old]) for old in errors[0]}
    for new, training in modes.items():
        new.train(training)
    return found


Outputs = dict[nn.Module, list[Tensor]]
"""By layer, what each call gave."""


def _run_old(model: nn.Module, layers: Any, run: Run) -> tuple[Any, Outputs]:
    given: Outputs = {}

    def note(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        given.setdefault(layer, []).append(bare(layer, args, kwargs))

    with _hooked(layers, note):
        return run(model), given


def _run_new(
    model: nn.Module, layers: dict[nn.Module, nn.Module], run: Run, before: Callable[..., None] | None = None
) -> tuple[Any, Outputs]:
    """Run the model as if it had the new layers: hooks put their outputs in the place of the old ones'."""
    given: Outputs = {}

    def replace(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        new = layers[layer]
        if before is not None:
            before(layer, new, args, kwargs)
        given.setdefault(layer, []).append(bare(new, args, kwargs))
        return type(new).forward(new, *args, **kwargs)

    with _hooked(layers, replace):
        return run(model), given


@contextlib.contextmanager
def _hooked(layers: Any, hook: Any) -> Iterator[None]:
    handles = [layer.register_forward_hook(hook, prepend=True, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def bare(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """What the layer gives before anything is added and activated."""
    kwargs = {name: value for name, value in kwargs.items() if name != "residual"}
    if not isinstance(layer, Norm) or layer.activation is None:
        return type(layer).forward(layer, *args, **kwargs)
    activation, layer.activation = layer.activation, None
    try:
        return type(layer).forward(layer, *args, **kwargs)
    finally:
        layer.activation = activation


class _Fill:
    """Gives a new layer that keeps running statistics those of its input, where the old one has none to give."""

    def __call__(self, old: nn.Module, new: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        here: Any = new
        if getattr(new, "running_mean", None) is None or getattr(old, "running_mean", None) is not None:
            return
        if int(here.num_batches_tracked):
            return  # a second call: those of the first
        mean, var = moments_of(new, args, kwargs).unbiased()
        here.running_mean.copy_(mean)
        here.running_var.copy_(var)
        here.num_batches_tracked.fill_(1)


@dataclass
class _Fit:
    """Fits a new layer to what the old one gave in the same call, and in those before it."""

    wanted: Outputs
    keep: set[nn.Module]
    fill: _Fill = field(default_factory=_Fill)
    calls: dict[nn.Module, list[tuple]] = field(default_factory=dict)

    def __call__(self, old: nn.Module, new: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.fill(old, new, args, kwargs)
        calls = self.calls.setdefault(old, [])
        calls.append((args, kwargs))
        if old in self.keep or old not in self.wanted:
            return
        wanted = torch.cat([_rows(y, new) for y in self.wanted[old][: len(calls)]])
        alpha = getattr(new, "alpha", None)
        if isinstance(alpha, Tensor) and alpha.numel() == 1:
            spread = torch.cat([_rows(a[0] if a else k["input"], new) for a, k in calls]).std().clamp_min(1e-12)
            scores = {}
            for slope in _ALPHAS:
                alpha.fill_(slope / float(spread))
                scores[slope] = _least_squares(new, calls, wanted)
            alpha.fill_(min(scores, key=lambda slope: scores[slope]) / float(spread))
        _least_squares(new, calls, wanted)


def _least_squares(new: Any, calls: list[tuple], wanted: Tensor) -> float:
    """Set weight and bias to the best there are; the mean square that is left."""
    weight, bias = new._parameters.get("weight"), new._parameters.get("bias")
    for parameter, neutral in ((weight, 1.0), (bias, 0.0)):
        if parameter is not None:
            parameter.fill_(neutral)
    plain = torch.cat([_rows(bare(new, *each), new) for each in calls])
    there = plain.mean(0) if bias is not None else torch.zeros_like(plain[0])
    goal = wanted.mean(0) if bias is not None else torch.zeros_like(plain[0])
    centred = plain - there
    square = centred.square().sum(0)
    slope = torch.ones_like(square)
    if weight is not None:
        usable = square > torch.finfo(torch.float32).tiny
        slope = torch.where(usable, (centred * (wanted - goal)).sum(0) / square.where(usable, 1), 0)
        weight.copy_(slope.view_as(weight))
    if bias is not None:
        bias.copy_((goal - slope * there).view_as(bias))
    return float((plain * slope + (goal - slope * there) - wanted).square().mean())


def _rows(x: Tensor, layer: Any) -> Tensor:
    """(values, channels), in float64."""
    x = x.double()
    if hasattr(layer, "normalized_shape") and not getattr(layer, "channels_first", False):
        return x.reshape(-1, *layer.normalized_shape).flatten(1)
    return x.movedim(1, -1).flatten(0, -2) if x.dim() > 1 else x[:, None]


def _floats(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _error(now: list[Tensor], wanted: list[Tensor]) -> float:
    """Root mean square error in standard deviations of what was wanted."""
    a, b = (torch.cat([t.double().flatten() for t in tensors] or [torch.zeros(1)]) for tensors in (now, wanted))
    spread = Moments.measure(b, (0,)).var().sqrt() if b.numel() else b.new_ones(())
    return float((a - b).square().mean().sqrt() / spread.clamp_min(torch.finfo(torch.float32).tiny))
