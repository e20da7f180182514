"""EvoNorm B0: norm and activation in one, found by a search; by the deviations of the batch and of each sample."""

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
    name="evonorm_b0",
    summary="Over the deviation of the batch, or a line above that of the sample: norm and activation in one.",
    over=None,
    pools="batch and instance",
    center=False,
    laws=frozenset({"scale", "channel_scale", "channel"}),
    twin=None,
    paper="Liu, Brock, Simonyan & Le 2020, arXiv:2004.02967",
)


def evonorm_b0(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    v: Tensor,
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
    """Divide by the deviation of the batch, or by a line in x above that of the sample; scale, shift; add; activate.

    ``y = activation(x / max(sqrt(var + eps), v * x + sqrt(own + eps)) * weight + bias + residual)``, where ``var`` is
    that of a channel over the batch and space, and ``own`` that of a channel of a sample over space (both biased).

    Args:
        x: (n, c, s...).
        running_mean: (c,), which moves and is used for nothing; ``None``: none is kept.
        running_var: (c,), by which evaluation divides; it moves in training, by the unbiased variance.
        v: (c,), the slope of the line.
        weight: (c,), or ``None`` for 1.
        bias: (c,), or ``None`` for 0.
        training: by the variance of the batch; otherwise by the running one.
        momentum: share of the new batch.
        eps: added to the variances.
        activation: a further one; ``"relu"``, ``"leaky_relu"``, ``"silu"``, ``"gelu"``, a callable, or ``None``.
        residual: (n, c, s...), added after the affine step and before ``activation``.
        backend: see :func:`normkit.backend`.

    Returns:
        Of the shape of x.

    Raises:
        ValueError: a residual of another shape; an unknown name; evaluation without a running variance.

    >>> import torch, normkit as nk
    >>> x = torch.tensor([[[2.0, 6.0]]])
    >>> nk.functional.evonorm_b0(x, None, None, torch.zeros(1), training=True, eps=0.0).tolist()
    [[[1.0, 3.0]]]

    Source: Liu, Brock, Simonyan & Le 2020, arXiv:2004.02967.
    """
    if isinstance(x, Proxy):
        return traced_as_call(evonorm_b0, locals())
    kept = None if running_mean is None or running_var is None else Kept(running_mean, running_var, momentum)
    details: dict[str, Any] = {"eps": eps, "activation": activation, "residual": residual, "backend": backend}
    return _normalise(x, running_var, kept if training else None, v, weight, bias, training, details)


def _normalise(
    x: Tensor,
    running_var: Tensor | None,
    kept: Kept | None,
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    by_batch: bool,
    details: dict[str, Any],
) -> Tensor:
    """By the batch, whose moments then enter what is kept; or by the running variance."""
    if not by_batch and running_var is None:
        raise ValueError("evonorm_b0: evaluation divides by running_var, which is None; give it, or training=True")
    eps, space, batch = details["eps"], tuple(range(2, x.dim())), (0, *range(2, x.dim()))
    wide = widened(x)[0]  # once: the gradients of two casts would meet in the narrow type
    whole = Moments.measure(wide, batch) if by_batch else None

    def by_torch() -> Tensor:
        line, *parameters = widened(v, weight, bias)
        var = running_var if whole is None else whole.m2 / whole.count.clamp(min=1)
        own = _over_space(wide, space)
        least = along_channels(torch.sqrt(var + eps).to(wide.dtype), x)
        return affine(
            wide / torch.maximum(least, along_channels(line, x) * wide + own.add(eps).sqrt()), *parameters
        ).to(x.dtype)

    def reference() -> Tensor:
        wide, line, var, *parameters = doubled(x, v, running_var, weight, bias)
        if by_batch:
            var = _average((wide - _average(wide, batch)).square(), batch)
        own = _average((wide - _average(wide, space)).square(), space) if space else torch.zeros_like(wide)
        lines = along_channels(line, x) * wide + (own + eps).sqrt()
        least = (var.reshape(1, -1, *[1] * len(space)) + eps).sqrt().expand_as(lines)
        return affine(wide / torch.where(lines > least, lines, least), *parameters).to(x.dtype)

    y = normalize(SPEC, x, weight, bias, by_torch=by_torch, reference=reference, **details)
    if whole is not None and kept is not None and x.numel():
        kept.observe(Moments(whole.count, whole.mean.detach(), whole.m2.detach()))
    return y


def _over_space(x: Tensor, space: tuple[int, ...]) -> Tensor:
    """The variance of each channel of each sample, (n, c, 1...); 0 where there is no space."""
    if not space:
        return torch.zeros_like(x)
    own = Moments.measure(x, space)
    return (own.m2 / own.count.clamp(min=1)).view(*x.shape[:2], *[1] * len(space))


def _average(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """0 where there is nothing to average."""
    values = 1
    for axis in axes:
        values *= x.shape[axis]
    return x.sum(axes, keepdim=True) / max(values, 1)


class EvoNormB0(Norm, RunningStatistics, _NormBase, spec=SPEC):
    """Divide by the deviation of the batch, or by a line above that of the sample: a norm that brings its activation.

    ``y = activation(x / max(sqrt(var + eps), v * x + sqrt(own + eps)) * weight + bias + residual)``, where ``var`` is
    that of a channel over the batch and space (in evaluation the running one), and ``own`` that of a channel of a
    sample over space, both biased.

    Args:
        num_features: channels.
        eps: added to the variances.
        momentum: share of the new batch in the running statistics; ``None``: the average over all batches.
        device: of parameters and buffers.
        dtype: of the parameters, ``v`` and ``weight`` 1, ``bias`` 0, all (c,); running statistics are float32 or
            better.
        activation: a further one, which the paper does not have; a name, a module or its class, or ``None``.
        backend: see :func:`normkit.backend`.
        low_precision_buffers: let ``.half()`` and ``.bfloat16()`` cast the running statistics, as torch does.

    Shapes: input, ``residual`` and output (n, c, s...). ``forward(input, *, residual=None)``.

    Raises:
        ValueError: a residual of another shape; an unknown activation or backend.

    >>> import torch, normkit as nk
    >>> norm = nk.EvoNormB0(3)
    >>> norm(torch.randn(8, 3, 4, 4)).shape, norm.num_batches_tracked.item()
    (torch.Size([8, 3, 4, 4]), 1)

    The running mean is kept and used for nothing, so that all that normkit does to running statistics does it to these.

    When not to use it: before a ReLU, where it stands for both; where batches are small, as batch norm.

    Source: Liu, Brock, Simonyan & Le 2020, arXiv:2004.02967.
    """

    activates = True

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
        self.v = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self._set_statistics(low_precision_buffers)
        self._set_options(activation, backend)

    def reset_parameters(self) -> None:
        """v and weight 1, bias 0, running statistics as new."""
        super().reset_parameters()
        if hasattr(self, "v"):  # torch's constructor resets before there is one
            nn.init.ones_(self.v)

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """(n, c, s...) -> the same; ``residual`` (same shape) is added after the affine step."""
        details: dict[str, Any] = {
            "eps": self.eps,
            "activation": self.activation,
            "residual": residual,
            "backend": self.backend,
        }
        by_batch = self.training and not self.frozen
        kept = self.kept() if by_batch else None
        return _normalise(input, self.running_var, kept, self.v, self.weight, self.bias, by_batch, details)
