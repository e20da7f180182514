"""Statistics: what norms compute from a batch, how sure it is, and how far running statistics are from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from normkit.measure.observer import Numbers, Observer, Seen
from normkit.measure.sites import INSTANCE, Site, machine_eps, norm_site, wide
from normkit.vocabulary.quantity import Quantity

MODEL = (
    Quantity("running_nonfinite", "model", "values", "NaN or infinite values in running_mean and running_var"),
    Quantity("scale_zero_share", "model", "share", "weights of the norm with |weight| < 1e-3 / weights"),
    Quantity("scale_least", "model", "", "min |weight|"),
    Quantity("scale_greatest", "model", "", "max |weight|"),
)
BATCH = (
    Quantity("values_per_channel", "batch", "values", "how many values share one mean and one variance in this batch"),
    Quantity(
        "batch_noise",
        "batch",
        "deviations",
        "standard error of the batch mean: std over samples of each sample's mean / sqrt(n) / std, rms over channels",
        "Luo et al. 2018, arXiv:1809.00846",
    ),
    Quantity(
        "variance_noise",
        "batch",
        "relative",
        "standard error of the batch variance / variance, samples taken as independent, rms over channels",
        "Luo et al. 2018, arXiv:1809.00846",
    ),
    Quantity(
        "mean_drift", "batch", "deviations", "mean over channels of |mean - running_mean| / sqrt(running_var + eps)"
    ),
    Quantity("variance_drift", "batch", "nats", "mean over channels of |log((var + eps) / (running_var + eps))|"),
    Quantity("least_variance_over_eps", "batch", "", "min over units of variance / eps"),
    Quantity("constant_share", "batch", "share", "units whose variance is below eps / units"),
)
QUANTITIES = (*MODEL, *BATCH)
ZERO = 1e-3
"""A scale below this passes on less than a thousandth of a deviation."""


def observe(seen: Seen, wanted: frozenset[str]) -> Numbers:
    """What one call shows, before running statistics move."""
    x, site = seen.input, norm_site(seen.module)
    if x is None or site is None or not x.is_floating_point() or not x.numel():
        return {}
    eps = machine_eps(x) if site.eps is None else site.eps
    view, layout = site.lay(wide(x))
    if not layout.values:
        return {}
    var, mean = torch.var_mean(view, layout.pooled, correction=0)
    spread = var if site.center else var + mean.square()
    found = {
        "values_per_channel": torch.tensor(float(layout.values)),
        "least_variance_over_eps": spread.min() / eps if eps else spread.new_full((), float("inf")),
        "constant_share": (spread < eps).float().mean(),
    }
    if wanted & {"mean_drift", "variance_drift"}:
        found |= drift(seen.module, site, mean, var, layout.values, eps)
    if site.across_samples and len(view) > 1 and wanted & {"batch_noise", "variance_noise"}:
        found |= noise(view, mean, var)
    return {name: value for name, value in found.items() if name in wanted}


def drift(module: Any, site: Site, mean: Tensor, var: Tensor, values: int, eps: float) -> dict[str, Tensor]:
    """How far the statistics of a batch are from the running ones."""
    running_mean, running_var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if running_mean is None or running_var is None or values < 2:
        return {}
    if site.pattern == INSTANCE:
        mean, var = mean.mean(0), var.mean(0)
    var = var * (values / (values - 1))  # what running statistics take in
    scale = running_var + eps
    return {
        "mean_drift": ((mean - running_mean).abs() / scale.sqrt()).mean(),
        "variance_drift": ((var + eps) / scale).log().abs().mean(),
    }


def noise(view: Tensor, mean: Tensor, var: Tensor) -> dict[str, Tensor]:
    """Standard errors of mean and variance of (n, c, s...).

    The values of one sample depend on each other, so the samples are what is counted: of n independent samples, the
    error of their average is their own deviation / sqrt(n).
    """
    n = len(view)
    deviations = view - mean.view(-1, *[1] * (view.dim() - 2))
    of_means = deviations.flatten(2).mean(-1) if view.dim() > 2 else deviations
    of_squares = deviations.square().flatten(2).mean(-1) if view.dim() > 2 else deviations.square()
    error = lambda per_sample: per_sample.var(0) / n
    rms = lambda squares: squares[var > 0].mean().sqrt()
    return {"batch_noise": rms(error(of_means) / var), "variance_noise": rms(error(of_squares) / var.square())}


def read_off(model: nn.Module, wanted: frozenset[str]) -> Iterator[tuple[str, str, Tensor]]:
    """What needs no data, of every norm."""
    for name, module in model.named_modules():
        running = [
            t for t in (getattr(module, key, None) for key in ("running_mean", "running_var")) if isinstance(t, Tensor)
        ]
        weight = getattr(module, "weight", None) if norm_site(module) is not None else None
        found = {}
        if running:
            found["running_nonfinite"] = sum((~t.isfinite()).sum() for t in running)
        if isinstance(weight, Tensor) and weight.numel():
            size = wide(weight).abs()
            found["scale_zero_share"] = (size < ZERO).float().mean()
            found["scale_least"], found["scale_greatest"] = size.min(), size.max()
        yield from ((quantity, name, value) for quantity, value in found.items() if quantity in wanted)


OBSERVER = Observer(BATCH, lambda module: norm_site(module) is not None, before=True, read=observe)
