"""Statistics: what norms compute from a batch, how sure it is, and how far running statistics are from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from normkit.measure.observer import Numbers, Observer, Seen
from normkit.measure.sites import INSTANCE, Laid, Site, machine_eps, norm_site, wide
from normkit.statistics.ghost import Ghost, Parts
from normkit.statistics.synchronized import Synchronized
from normkit.vocabulary.quantity import Quantity

_LUO = "Luo et al. 2018, arXiv:1809.00846"
MODEL = (
    Quantity("running_nonfinite", "model", "values", "NaN or infinite values in running_mean and running_var"),
    Quantity(
        "scale_zero_share",
        "model",
        "share",
        "weights of the norm with |weight| < 1e-3 / weights",
        means="Channels that a norm switches off by a scale next to 0.",
    ),
    Quantity("scale_least", "model", "", "min |weight|", means="The least scale of a norm, without its sign."),
    Quantity("scale_greatest", "model", "", "max |weight|", means="The greatest scale of a norm, without its sign."),
)
BATCH = (
    Quantity(
        "values_per_channel",
        "batch",
        "values",
        "how many values share one mean and one variance in this batch: of the least part, where it is cut into ghost "
        "batches; of all processes, where they are synchronized",
    ),
    Quantity(
        "batch_noise",
        "batch",
        "deviations",
        "standard error of the batch mean: deviation over the n samples of each sample's mean / sqrt(n), in deviations "
        "of the channel; rms over channels",
        _LUO,
        means="How uncertain the mean of a batch is, in deviations of the channel.",
    ),
    Quantity(
        "variance_noise",
        "batch",
        "relative",
        "standard error of the batch variance / variance: as batch_noise, of each sample's mean squared deviation",
        _LUO,
        means="How uncertain the variance of a batch is, relative to it.",
    ),
    Quantity(
        "mean_drift",
        "batch",
        "deviations",
        "mean over channels of |mean - running_mean| / sqrt(running_var + eps)",
        means="How far the running mean is from the mean of this batch.",
    ),
    Quantity(
        "variance_drift",
        "batch",
        "nats",
        "mean over channels of |log((var + eps) / (running_var + eps))|",
        means="How far the running variance is from that of this batch, as a logarithm: 0.69 is a factor of 2.",
    ),
    Quantity(
        "least_variance_over_eps",
        "batch",
        "",
        "least variance (mean square, of an RMS norm) of a unit / eps",
        means="The quietest unit beside eps: far below 1 it is eps that is divided by.",
    ),
    Quantity(
        "constant_share",
        "batch",
        "share",
        "units whose variance (mean square, of an RMS norm) < eps / units",
        means="Units that hardly change over the batch: it is eps that they are divided by.",
    ),
)
QUANTITIES = (*MODEL, *BATCH)
ZERO = 1e-3
"""A scale below this passes on less than a thousandth of a deviation."""


def observe(seen: Seen, wanted: frozenset[str]) -> Numbers:
    """What one call shows, before running statistics move."""
    x, site = seen.input, norm_site(seen.module)
    if x is None or site is None or not x.is_floating_point():
        return {}
    laid = site.lay(wide(x), seen.kwargs)
    if laid is None or not laid.x.numel():
        return {}
    eps = machine_eps(x) if site.eps is None else site.eps
    mean, var = laid.mean_and_variance()
    spread = var if site.center else var + mean.square()
    found = {
        "values_per_channel": laid.count.min() * _share(seen.module, len(laid.x)),
        "least_variance_over_eps": spread.min() / eps,
        "constant_share": (spread < eps).float().mean(),
    }
    if wanted & {"mean_drift", "variance_drift"}:
        found |= drift(seen.module, site, laid, mean, var, eps)
    if site.across_samples and wanted & {"batch_noise", "variance_noise"}:
        found |= noise(laid, mean, var)
    return {name: value for name, value in found.items() if name in wanted}


def _share(module: Any, samples: int) -> float:
    """How much of the batch, or how many of such batches, share a mean."""
    policy = getattr(module, "statistics", None)
    if isinstance(policy, Ghost):
        return Parts(samples, policy.size).smallest / samples
    if isinstance(module, nn.SyncBatchNorm) and not isinstance(policy, Synchronized):
        return float(dist.get_world_size(module.process_group)) if dist.is_initialized() else 1.0
    if isinstance(policy, Synchronized) and not policy.alone():
        return float(dist.get_world_size(policy.process_group))
    return 1.0


def drift(module: Any, site: Site, laid: Laid, mean: Tensor, var: Tensor, eps: float) -> dict[str, Tensor]:
    """How far the statistics of a batch are from the running ones."""
    running_mean, running_var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if running_mean is None or running_var is None:
        return {}
    var = var * (laid.count / (laid.count - 1)).to(var.dtype)  # what running statistics take in; 0 / 0 is NaN
    if site.pattern == INSTANCE:
        mean, var = mean.mean(0), var.mean(0)
    scale = running_var + eps
    return {
        "mean_drift": ((mean - running_mean).abs() / scale.sqrt()).mean(),
        "variance_drift": ((var + eps) / scale).log().abs().mean(),
    }


def noise(laid: Laid, mean: Tensor, var: Tensor) -> dict[str, Tensor]:
    """Standard errors of mean and variance of (n, c, s...).

    The values of one sample depend on each other, so the samples are what is counted: of n independent samples, the
    error of their average is their own deviation / sqrt(n).
    """
    n = len(laid.x)
    if n < 2 or laid.keep is not None:
        return {}
    deviations = (laid.x - mean.view(-1, *[1] * (laid.x.dim() - 2))).flatten(2) if laid.x.dim() > 2 else laid.x - mean
    of_sample = lambda t: t.mean(-1) if t.dim() > 2 else t
    moving = var > 0
    rms = lambda squares: (torch.where(moving, squares, 0).sum() / moving.sum()).sqrt()
    return {
        "batch_noise": rms(of_sample(deviations).var(0) / n / var),
        "variance_noise": rms(of_sample(deviations.square()).var(0) / n / var.square()),
    }


def read_off(model: nn.Module, wanted: frozenset[str]) -> Iterator[tuple[str, str, Tensor]]:
    """What needs no data, of every norm."""
    for name, module in model.named_modules():
        found: dict[str, Tensor] = {}
        running = [getattr(module, key, None) for key in ("running_mean", "running_var")]
        if tensors := [t for t in running if isinstance(t, Tensor)]:
            found["running_nonfinite"] = torch.cat([~t.flatten().isfinite() for t in tensors]).sum()
        weight = getattr(module, "weight", None) if norm_site(module) is not None else None
        if isinstance(weight, Tensor) and weight.numel():
            size = wide(weight).abs()
            found |= {"scale_zero_share": (size < ZERO).float().mean(), "scale_least": size.min()}
            found["scale_greatest"] = size.max()
        yield from ((quantity, name, value) for quantity, value in found.items() if quantity in wanted)


OBSERVER = Observer(BATCH, lambda module: norm_site(module) is not None, before=True, read=observe)
