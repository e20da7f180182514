"""Instance norm: standardise each channel of each sample by itself."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from normkit.dispatch import normalize
from normkit.epilogue import Activation
from normkit.moments import Moments
from normkit.norm import Norm, like, traced_as_call, unambiguous
from normkit.statistics.buffers import Kept, LazyFeatures, RunningStatistics, as_statistics
from normkit.statistics.masking import blanked
from normkit.vocabulary.spec import Spec

SPEC = Spec(
    name="instance_norm",
    summary="Each channel of each sample by itself, over space; for style transfer and image generation.",
    over="n c [s...]",
    center=True,
    laws=frozenset(
        {"scale", "shift", "sample_scale", "sample_shift", "channel_scale", "channel_shift", "sample", "channel"}
    ),
    twin="torch.nn.InstanceNorm{dim}d",
    paper="Ulyanov, Vedaldi & Lempitsky 2016, arXiv:1607.08022",
    aliases=("instance", "in"),
)


def instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: Activation = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Standardise each channel of each sample over space (or by running statistics), scale, shift; add; activate.

    ``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)`` with the biased variance.

    Args:
        x: (n, c, s...).
        running_mean: (c,), or ``None`` to keep none; holds the average over the samples.
        running_var: (c,), or ``None``.
        weight: (c,), or ``None`` for 1.
        bias: (c,), or ``None`` for 0.
        use_input_stats: normalise by the input; otherwise by the running statistics.
        momentum: share of the new batch.
        eps: added to the variance.
        activation: ``"relu"``, ``"leaky_relu"``, ``"silu"``, ``"gelu"``, a callable, or ``None``.
        residual: (n, c, s...), added after the affine step and before the activation.
        mask: of bool, True where a value counts: (n, s...), or any shape with as many axes as x that broadcasts to it.
            Mean and variance of an instance are over its values that count; elsewhere the output and all gradients are
            0. The running statistics average the instances that have a mean (one value) and a variance (two).
        lengths: (n,), or (n, axes of space): the mask of samples that are padded at the end.
        backend: see :func:`normkit.backend`.

    Returns:
        (n, c, s...), channels-last for a channels-last input.

    Raises:
        ValueError: one value per instance; a residual of another shape; an unknown name; a mask or lengths that do not
            fit.

    Differs from ``torch.nn.functional.instance_norm``: keeps channels-last; a batch with NaN or infinity leaves the
    running statistics as they were.

    >>> import torch, normkit as nk
    >>> nk.functional.instance_norm(torch.tensor([[[1.0, 3.0]]]), eps=1e-12).tolist()
    [[[-1.0, 1.0]]]

    Do not use it where the contrast of a single sample carries the answer (most classification).

    Source: Ulyanov, Vedaldi & Lempitsky 2016, arXiv:1607.08022.
    """
    if isinstance(x, Proxy):
        return traced_as_call(instance_norm, locals())
    if mask is not None or lengths is not None:
        x, residual, mask = blanked(SPEC.name, SPEC.over, x, residual, mask, lengths)
    details = {"eps": eps, "residual": residual, "activation": activation, "backend": backend, "mask": mask}
    if not use_input_stats or running_mean is None or running_var is None:
        return _call(x, running_mean, running_var, weight, bias, use_input_stats, momentum, details)
    return _train(x, Kept(running_mean, running_var, momentum), weight, bias, details)


def _train(x: Tensor, kept: Kept, weight: Tensor | None, bias: Tensor | None, details: dict) -> Tensor:
    """Normalise by the input, then let its moments into the running statistics if they are finite."""
    momentum, _ = kept.pace(lambda: x.shape[0])
    mean, var = kept.mean.clone(), kept.var.clone()
    y = _call(x, mean, var, weight, bias, True, momentum, details)
    if kept.pending is None or kept.still:
        kept.commit((mean, var))
    else:  # averages over the samples: of their means, and of their variances
        samples = _samples(x, details.get("mask"))
        kept.observe(Moments(samples, mean, var * samples.to(var.dtype)))
    return y


def _samples(x: Tensor, mask: Tensor | None) -> Tensor:
    """How many samples have a mean and a variance, in float64; (c,) where a mask is given."""
    if mask is None:
        return torch.full((), x.shape[0], dtype=torch.float64, device=x.device)
    enough = mask.expand_as(x).flatten(2).sum(2) >= 2
    return enough.sum(0, dtype=torch.float64)


def _call(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    details: dict,
) -> Tensor:
    weight, bias = as_statistics(running_mean, weight, bias)

    arguments = (x, running_mean, running_var, weight, bias, use_input_stats, momentum, details["eps"])
    return normalize(
        SPEC,
        x,
        weight,
        bias,
        by_torch=lambda: _by_torch(*arguments),
        running_mean=running_mean,
        running_var=running_var,
        batch_statistics=use_input_stats,
        momentum=momentum,
        **details,
    )


def _by_torch(x: Tensor, *arguments: Any) -> Tensor:
    """torch's function of this name, with its arguments."""
    if not x.numel():  # torch's instance norm cannot take an empty batch; batch norm can, and gradients are 0
        _, _, weight, bias, _, _, eps = arguments
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
    return like(unambiguous(F.instance_norm(x, *arguments)), x)


class _InstanceNorm(Norm, RunningStatistics):
    """Forward and options of instance norm; the classes below add torch's class of each dimension."""

    def forward(
        self,
        input: Tensor,
        *,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """(n, c, s...) or (c, s...) -> the same; ``residual`` (same shape) is added before the activation.

        ``mask`` or ``lengths`` say what is padding: see :func:`normkit.functional.instance_norm`. Of a sample without
        its axis n they have none either: (s...) and (), or (axes of space,).
        """
        self._check_input_dim(input)
        single = input.dim() == self._get_no_batch_dim()  # type: ignore[operator]
        channels = input.size(0 if single else 1)
        if channels != self.num_features:
            self._complain(channels, 0 if single else 1)
        if single:
            alone: Any = lambda t: None if t is None else torch.as_tensor(t).unsqueeze(0)
            given = [alone(t) for t in (input, residual, mask, lengths)]
            return self._apply_instance_norm(*given).squeeze(0)
        return self._apply_instance_norm(input, residual, mask, lengths)

    def _apply_instance_norm(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        if mask is not None or lengths is not None:
            input, residual, mask = blanked(type(self).__name__, SPEC.over, input, residual, mask, lengths)
        elif not self.track_running_stats and self.running_mean is None:
            weight, bias = self._parameter("weight"), self._parameter("bias")
            y = self._straight(input, residual, _by_torch, input, None, None, weight, bias, True, 0.0, self.eps)
            if y is None:
                y = self._by_kernels(input, residual, weight, bias, self.eps)
            if y is not None:
                return y
        details = {
            "eps": self.eps,
            "residual": residual,
            "activation": self.activation,
            "backend": self.backend,
            "mask": mask,
        }
        by_input = (self.training and not self.frozen) or not self.track_running_stats
        kept = self.kept() if by_input else None
        if kept is None:
            mean, var, momentum = self.running_mean, self.running_var, self.momentum or 0.0
            return _call(input, mean, var, self.weight, self.bias, by_input, momentum, details)
        return _train(input, kept, self.weight, self.bias, details)

    def kept(self) -> Kept | None:
        kept = super().kept()
        if kept is not None:
            kept.tracked = None  # torch's instance norm does not count its batches
            kept.spread = False
        return kept

    def _complain(self, channels: int, axis: int) -> None:
        sizes = f"input's size at dim={axis}"
        if self.affine:
            raise ValueError(
                f"expected {sizes} to match num_features ({self.num_features}), but got: {channels}.\n"
                f"  build the layer with num_features={channels}, or give it {self.num_features} channels"
            )
        warnings.warn(
            f"{sizes} does not match num_features. You can silence this warning by not passing in num_features, which "
            "is not used because affine=False",
            stacklevel=3,
        )

    def _extra_options(self) -> list[str]:
        own = ["frozen=True"] if self.frozen else []
        own += ["low_precision_buffers=True"] if self.low_precision_buffers else []
        return [*super()._extra_options(), *own]


class _Sized(_InstanceNorm):
    """Built for a known number of channels."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: Activation | type[nn.Module] = None,
        backend: str | None = None,
        low_precision_buffers: bool = False,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self._set_bias(bias)
        self._set_statistics(low_precision_buffers)
        self._set_options(activation, backend)


class _Lazy(LazyFeatures, _InstanceNorm):
    """Takes the number of channels from the first input."""

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: Activation | type[nn.Module] = None,
        backend: str | None = None,
        low_precision_buffers: bool = False,
    ) -> None:
        super().__init__(eps, momentum, affine, track_running_stats, device, dtype)
        self._set_bias(bias)
        self._set_statistics(low_precision_buffers)
        self._set_options(activation, backend)


class InstanceNorm2d(_Sized, nn.InstanceNorm2d, spec=SPEC, dim=2):
    """Standardise each channel of each sample of (n, c, h, w) over space, then scale, shift, add, activate.

    ``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)``, mean and (biased) variance over h, w.

    Args:
        num_features: channels.
        eps: added to the variance.
        momentum: share of the new batch in the running statistics.
        affine: learn ``weight`` and ``bias``, both (c,).
        track_running_stats: keep running statistics and use them in evaluation.
        device: of parameters and buffers.
        dtype: of the parameters; running statistics are float32 or better whatever it is.
        bias: with ``affine``, learn ``bias`` too.
        activation: a name, a module or its class, or ``None``; a child module of the layer.
        backend: see :func:`normkit.backend`.
        low_precision_buffers: let ``.half()`` and ``.bfloat16()`` cast the running statistics, as torch does.

    Shapes: input, ``residual`` and output (n, c, h, w) or (c, h, w). ``forward(input, *, residual=None, mask=None,
    lengths=None)``: the mask (True: keep), (n, h, w), or the lengths of padded samples, (n, 2).

    Raises:
        ValueError: an input with another number of axes or channels; one value per instance.

    >>> import torch, normkit as nk
    >>> y = nk.InstanceNorm2d(3)(torch.randn(2, 3, 8, 8) * torch.tensor([1.0, 9.0]).view(2, 1, 1, 1))
    >>> y.var((2, 3), correction=0).round(decimals=2).unique().tolist()
    [1.0]

    Differs from ``torch.nn.InstanceNorm2d``: a channels-last input gives a channels-last output; running statistics
    stay float32 and are not moved by a batch with NaN or infinity.

    Source: Ulyanov, Vedaldi & Lempitsky 2016, arXiv:1607.08022.
    """


class InstanceNorm1d(_Sized, nn.InstanceNorm1d, spec=SPEC, dim=1):
    """Standardise each channel of each sample of (n, c, l) or (c, l): see :class:`InstanceNorm2d`."""


class InstanceNorm3d(_Sized, nn.InstanceNorm3d, spec=SPEC, dim=3):
    """Standardise each channel of each sample of (n, c, d, h, w) or (c, d, h, w): see :class:`InstanceNorm2d`."""


class LazyInstanceNorm1d(_Lazy, nn.LazyInstanceNorm1d, spec=SPEC, dim=1, lazy=True):
    """:class:`InstanceNorm1d` that takes ``num_features`` from the first input."""

    cls_to_become = InstanceNorm1d


class LazyInstanceNorm2d(_Lazy, nn.LazyInstanceNorm2d, spec=SPEC, dim=2, lazy=True):
    """:class:`InstanceNorm2d` that takes ``num_features`` from the first input."""

    cls_to_become = InstanceNorm2d


class LazyInstanceNorm3d(_Lazy, nn.LazyInstanceNorm3d, spec=SPEC, dim=3, lazy=True):
    """:class:`InstanceNorm3d` that takes ``num_features`` from the first input."""

    cls_to_become = InstanceNorm3d
