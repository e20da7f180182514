"""Activations: what comes out of activation modules and norms, and how much of it is alive."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normkit.measure.observer import Numbers, Observer, Seen
from normkit.measure.sites import activation_of, by_unit, norm_site, wide
from normkit.vocabulary.quantity import Quantity

PERCENTILES = {"activation_p15": 0.15, "activation_p50": 0.50, "activation_p85": 0.85}
_VALUES = 65_536  # percentiles of more values than this are those of a regular sample
_SAMPLES = 256  # ranks are those of so many samples at most
_SQUARINGS = 10
_END = 0.015  # share of its range that counts as the end of a sigmoid: |tanh| > 0.97

QUANTITIES = (
    Quantity("activation_mean", "batch", "", "mean of all values that come out"),
    Quantity(
        "activation_std",
        "batch",
        "",
        "sqrt(mean((y - mean(y))²)) over all values that come out",
        means="How large the values are that come out: their standard deviation.",
    ),
    Quantity("activation_p15", "batch", "", "15th percentile of the values", "Ioffe & Szegedy 2015, arXiv:1502.03167"),
    Quantity("activation_p50", "batch", "", "median of the values", "Ioffe & Szegedy 2015, arXiv:1502.03167"),
    Quantity("activation_p85", "batch", "", "85th percentile of the values", "Ioffe & Szegedy 2015, arXiv:1502.03167"),
    Quantity(
        "dead_share",
        "batch",
        "share",
        "units of a ReLU, GELU, SiLU that are <= 0 for the whole batch / units",
        means="Units that give nothing for any sample of the batch, and so learn nothing.",
    ),
    Quantity(
        "saturated_share",
        "batch",
        "share",
        "values of a sigmoid or tanh within 1.5 % of its range of an end / values",
        means="Values so close to the end of a sigmoid or tanh that next to no gradient comes back.",
    ),
    Quantity(
        "stable_rank",
        "batch",
        "dimensions",
        "||Y||_F² / ||Y||_2², Y: (samples, features), the first 256 samples",
        "Daneshmand et al. 2020, arXiv:2003.01652",
        means="In how many directions the samples of a batch differ: at 1 all of them have become alike.",
    ),
    Quantity(
        "orthogonality_gap",
        "batch",
        "",
        "||Y Yᵀ / ||Y||_F² - I / n||_F, Y: (n samples, features), the first 256 samples",
        "Daneshmand et al. 2021, arXiv:2106.03970",
        means="How far the samples of a batch are from being orthogonal to each other, which is 0.",
    ),
)

_RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish)
_RANGES: tuple[tuple[type[nn.Module], float, float], ...] = (
    (nn.Sigmoid, 0.0, 1.0),
    (nn.Hardsigmoid, 0.0, 1.0),
    (nn.Tanh, -1.0, 1.0),
    (nn.Softsign, -1.0, 1.0),
)


def observe(seen: Seen, wanted: frozenset[str]) -> Numbers:
    """What one call of an activation or a norm sends on."""
    if not isinstance(seen.output, Tensor) or not seen.output.is_floating_point() or not seen.output.numel():
        return {}
    y, activation = wide(seen.output), activation_of(seen.module)
    found: dict[str, Tensor] = {}
    if wanted & {"activation_mean", "activation_std"}:
        var, mean = torch.var_mean(y, correction=0)
        found |= {"activation_mean": mean, "activation_std": var.sqrt()}
    if activation is not None:
        found |= _inside(y, activation, wanted)
    if wanted & {"stable_rank", "orthogonality_gap"} and y.dim() > 1:
        found |= ranks(y)
    return {name: value for name, value in found.items() if name in wanted}


def _inside(y: Tensor, activation: nn.Module, wanted: frozenset[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    if wanted & PERCENTILES.keys():
        values = y.flatten()[:: (y.numel() // _VALUES) | 1]  # odd: no beat with sizes, which are even
        shares = torch.tensor(list(PERCENTILES.values()), dtype=y.dtype, device=y.device)
        found |= dict(zip(PERCENTILES, values.quantile(shares), strict=True))
    if "dead_share" in wanted and _rectifies(activation):
        found["dead_share"] = (by_unit(y) <= 0).all(0).float().mean()
    for kind, low, high in _RANGES if "saturated_share" in wanted else ():
        if isinstance(activation, kind):
            end = (high - low) * _END
            found["saturated_share"] = ((y < low + end) | (y > high - end)).float().mean()
    return found


def _rectifies(activation: nn.Module) -> bool:
    return isinstance(activation, _RECTIFIERS) or any(
        kind.__name__.lower() in type(activation).__name__.lower() for kind in (nn.GELU, nn.SiLU)
    )


def ranks(y: Tensor) -> dict[str, Tensor]:
    """Stable rank and orthogonality gap of (n, features...), from the n x n matrix of inner products."""
    rows = y[:_SAMPLES].flatten(1)
    rows = rows / rows.abs().amax().clamp_min(torch.finfo(rows.dtype).tiny)  # so that no square overflows
    gram = rows @ rows.T
    gram = gram if gram.device.type == "mps" else gram.double()
    gram = gram / gram.trace()
    squares = gram.square().sum()
    gap = (squares - 1 / len(rows)).clamp_min(0).sqrt()
    return {"stable_rank": 1 / largest_eigenvalue(gram), "orthogonality_gap": gap}


def largest_eigenvalue(gram: Tensor) -> Tensor:
    """Of a symmetric positive semidefinite matrix of trace 1, to about 1e-4, without waiting for the device.

    G^1024 by squaring; the Rayleigh quotient of its largest column.
    """
    power = gram
    for _ in range(_SQUARINGS):
        power = power @ power
        power = power / power.trace()
    column = power.index_select(1, power.diagonal().argmax().unsqueeze(0)).squeeze(1)
    return column @ gram @ column / (column @ column)


def _listens(module: nn.Module) -> bool:
    return activation_of(module) is not None or norm_site(module) is not None


OBSERVER = Observer(QUANTITIES, _listens, before=False, read=observe)
