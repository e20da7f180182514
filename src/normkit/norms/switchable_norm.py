"""Switchable norm: learn how much of the statistics is the sample's, the layer's and the batch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _NormBase

from normkit.dispatch import normalize
from normkit.epilogue import Activation
from normkit.moments import Moments
from normkit.norm import Norm, affine, along_channels, doubled, traced_as_call, widened
from normkit.statistics.buffers import Kept, RunningStatistics
from normkit.vocabulary.spec import Spec

SPEC = Spec(
    name="switchable_norm",
    summary="A learned mixture of the statistics of instance, layer and batch norm.",
    over=None,
    pools="instance, layer, batch",
    center=True,
    laws=frozenset({"scale", "shift"}),
    twin=None,
    paper="Luo et al. 2019, arXiv:1806.10779",
    aliases=("switchable",),
)
OVER = ("instance", "layer", "batch")
"""Whose statistics are mixed, in the order of the learned logits."""


def switchable_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean_logits: Tensor,
    var_logits: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: Activation = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Standardise by a mixture of the statistics of instance, layer and batch; scale, shift; add; activate.

    ``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)``, where ``mean`` is the sum of the three
    means, each times its part of ``softmax(mean_logits)``, and ``var`` that of the three biased variances, by
    ``softmax(var_logits)``.

    Args:
        x: (n, c, s...).
        running_mean: (c,), the batch's in evaluation; ``None`` to keep none.
        running_var: (c,), or ``None``.
        mean_logits: (3,), for instance, layer and batch.
        var_logits: (3,), the same for the variances.
        weight: (c,), or ``None`` for 1.
        bias: (c,), or ``None`` for 0.
        training: take the batch's statistics from the batch, and move the running ones (unbiased variance).
        momentum: share of the new batch.
        eps: added to the variance.
        activation: ``"relu"``, ``"leaky_relu"``, ``"silu"``, ``"gelu"``, a callable, or ``None``.
        residual: (n, c, s...), added after the affine step and before the activation.
        backend: see :func:`normkit.backend`.

    Returns:
        Of the shape of x.

    Raises:
        ValueError: a residual of another shape; an unknown name; evaluation without running statistics.

    >>> import torch, normkit as nk
    >>> x, by_batch = torch.tensor([[1.0], [3.0]]), torch.tensor([-99.0, -99.0, 99.0])
    >>> nk.functional.switchable_norm(x, None, None, by_batch, by_batch, training=True, eps=0.0).tolist()
    [[-1.0], [1.0]]

    Source: Luo et al. 2019, arXiv:1806.10779.
    """
    if isinstance(x, Proxy):
        return traced_as_call(switchable_norm, locals())
    kept = None if running_mean is None or running_var is None else Kept(running_mean, running_var, momentum)
    running = None if training else known(running_mean, running_var)
    details: dict[str, Any] = {"eps": eps, "activation": activation, "residual": residual, "backend": backend}
    return _normalise(x, running, kept if training else None, (mean_logits, var_logits), weight, bias, details)


Pair = tuple[Tensor, Tensor]


def known(running_mean: Tensor | None, running_var: Tensor | None) -> Pair:
    """Both, or the message that says which part of evaluation needs them."""
    if running_mean is None or running_var is None:
        raise ValueError(
            "switchable_norm: evaluation takes the batch's part from running_mean and running_var, and one is None.\n"
            "  give both, or training=True"
        )
    return running_mean, running_var


def _normalise(
    x: Tensor,
    running: Pair | None,
    kept: Kept | None,
    logits: Pair,
    weight: Tensor | None,
    bias: Tensor | None,
    details: dict[str, Any],
) -> Tensor:
    """``running``: what stands for the batch's statistics; ``None``: the batch's own, which then enter what is kept."""
    eps = details["eps"]
    wide = widened(x)[0]  # once: the gradients of two casts would meet in the narrow type
    own = _instances(wide)

    def by_torch() -> Tensor:
        parameters = widened(weight, bias)
        batch: Any = _over(own, 0) if running is None else [along_channels(r, x).to(wide.dtype) for r in running]
        means, variances = zip(own, _over(own, 1), batch, strict=True)
        mean, var = (_mixed(*part) for part in zip(logits, (means, variances), strict=True))
        return affine((wide - mean) * torch.rsqrt(var + eps), *parameters).to(x.dtype)

    def reference() -> Tensor:
        wide, *parameters = doubled(x, weight, bias)
        space = tuple(range(2, x.dim()))
        found: list[Any] = [_by_hand(wide, axes) for axes in (space, (1, *space), (0, *space))]
        if running is not None:
            found[2] = [r.double().reshape(1, -1, *[1] * len(space)) for r in running]
        mixed = []
        for chosen, three in zip(logits, zip(*found, strict=True), strict=True):
            odds = torch.exp(chosen.double() - chosen.double().max())
            mixed.append(sum(odd / odds.sum() * part for odd, part in zip(odds, three, strict=True)))
        return affine((wide - mixed[0]) / (mixed[1] + eps).sqrt(), *parameters).to(x.dtype)

    y = normalize(SPEC, x, weight, bias, by_torch=by_torch, reference=reference, **details)
    if running is None and kept is not None and x.numel():
        mean, var = (t.detach().flatten() for t in _over(own, 0))
        count = torch.full((), x.numel() // x.shape[1], dtype=torch.float64, device=x.device)
        kept.observe(Moments(count, mean, var * count.to(var.dtype)))
    return y


def _instances(x: Tensor) -> Pair:
    """Mean and biased variance of each channel of each sample, (n, c, 1...)."""
    space = tuple(range(2, x.dim()))
    if not space:
        return x, torch.zeros_like(x)
    own = Moments.measure(x, space)
    shape = (*x.shape[:2], *[1] * len(space))
    return own.mean.view(shape), (own.m2 / own.count.clamp(min=1)).view(shape)


def _over(own: Pair, axis: int) -> Pair:
    """Those of all that meet along an axis, from each one's: within, and between, of which neither cancels."""
    values = max(own[0].shape[axis], 1)
    mean = own[0].sum(axis, keepdim=True) / values
    between = (own[0] - mean).square().sum(axis, keepdim=True)
    return mean, (own[1].sum(axis, keepdim=True) + between) / values


def _mixed(logits: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
    shares = torch.softmax(logits.to(parts[0].dtype), 0)
    return shares[0] * parts[0] + shares[1] * parts[1] + shares[2] * parts[2]


def _by_hand(x: Tensor, axes: tuple[int, ...]) -> Pair:
    """Mean and biased variance by their definitions; 0 where there is nothing to average."""
    if not axes:
        return x, torch.zeros_like(x)
    values = 1
    for axis in axes:
        values *= x.shape[axis]
    mean = x.sum(axes, keepdim=True) / max(values, 1)
    return mean, (x - mean).square().sum(axes, keepdim=True) / max(values, 1)


class SwitchableNorm(Norm, RunningStatistics, _NormBase, spec=SPEC):
    """Standardise by a learned mixture of the statistics of instance, layer and batch; scale, shift, add, activate.

    ``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)``, where ``mean`` is the sum of the three
    means, each times its part of ``softmax(mean_logits)``, and ``var`` that of the three biased variances, by
    ``softmax(var_logits)``; in evaluation the batch's part is that of the running statistics.

    Args:
        num_features: channels.
        eps: added to the variance.
        momentum: share of the new batch in the running statistics; ``None``: the average over all batches.
        device: of parameters and buffers.
        dtype: of the parameters; ``mean_logits`` and ``var_logits``, both (3,), start at 1: equal parts.
        activation: a name, a module or its class, or ``None``; a child module of the layer.
        backend: see :func:`normkit.backend`.
        low_precision_buffers: let ``.half()`` and ``.bfloat16()`` cast the running statistics, as torch does.

    Shapes: input, ``residual`` and output (n, c, s...). ``forward(input, *, residual=None)``.

    Raises:
        ValueError: a residual of another shape; an unknown activation or backend.

    >>> import torch, normkit as nk
    >>> norm = nk.SwitchableNorm(3)
    >>> norm(torch.randn(8, 3, 4, 4)).shape
    torch.Size([8, 3, 4, 4])
    >>> {over: round(part, 2) for over, part in norm.weights()["mean"].items()}
    {'instance': 0.33, 'layer': 0.33, 'batch': 0.33}

    When not to use it: where one norm is known to be right; it costs the statistics of three.

    Source: Luo et al. 2019, arXiv:1806.10779.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation | type[nn.Module] = None,
        backend: str | None = None,
        low_precision_buffers: bool = False,
    ) -> None:
        super().__init__(num_features, eps, momentum, device=device, dtype=dtype)
        self.mean_logits = nn.Parameter(torch.ones(len(OVER), device=device, dtype=dtype))
        self.var_logits = nn.Parameter(torch.ones(len(OVER), device=device, dtype=dtype))
        self._set_statistics(low_precision_buffers)
        self._set_options(activation, backend)

    def reset_parameters(self) -> None:
        """Equal parts, weight 1, bias 0, running statistics as new."""
        super().reset_parameters()
        if hasattr(self, "var_logits"):  # torch's constructor resets before there are any
            nn.init.ones_(self.mean_logits)
            nn.init.ones_(self.var_logits)

    def weights(self) -> dict[str, dict[str, float]]:
        """What has been learned: the parts of instance, layer and batch in the mean and in the variance."""
        logits = {"mean": self.mean_logits, "var": self.var_logits}
        return {
            statistic: dict(zip(OVER, torch.softmax(chosen.detach().double(), 0).tolist(), strict=True))
            for statistic, chosen in logits.items()
        }

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """(n, c, s...) -> the same; ``residual`` (same shape) is added before the activation."""
        details: dict[str, Any] = {
            "eps": self.eps,
            "activation": self.activation,
            "residual": residual,
            "backend": self.backend,
        }
        learning = self.training and not self.frozen
        running = None if learning else known(self.running_mean, self.running_var)
        kept = self.kept() if learning else None
        logits = self.mean_logits, self.var_logits
        return _normalise(input, running, kept, logits, self.weight, self.bias, details)
