"""Layer norm: standardise each sample (each token) over its features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from normkit.dispatch import normalize
from normkit.epilogue import Activation
from normkit.norm import OVER_CHANNELS, Norm, over_channels, single_axis, traced_as_call
from normkit.statistics.masking import blanked
from normkit.vocabulary.spec import Spec

SPEC = Spec(
    name="layer_norm",
    summary="Each sample or token over its features; the standard of transformers and recurrent networks.",
    over="n... [c...]",
    center=True,
    laws=frozenset({"scale", "shift", "sample_scale", "sample_shift", "sample"}),
    twin="torch.nn.LayerNorm",
    paper="Ba, Kiros & Hinton 2016, arXiv:1607.06450",
    aliases=("layer", "ln"),
)


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    channels_first: bool = False,
    activation: Activation = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Standardise over the last axes (or over the channels of (n, c, s...)); scale, shift; add; activate.

    ``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)`` with the biased variance.

    Args:
        x: (n..., c...), or (n, c, s...) with ``channels_first``.
        normalized_shape: the sizes of ``c...``; one size with ``channels_first``.
        weight: of shape ``normalized_shape``, or ``None`` for 1.
        bias: of shape ``normalized_shape``, or ``None`` for 0.
        eps: added to the variance.
        channels_first: the features are axis 1, in and out.
        activation: ``"relu"``, ``"leaky_relu"``, ``"silu"``, ``"gelu"``, a callable, or ``None``.
        residual: of the shape of x, added after the affine step and before the activation.
        mask: of bool, True where a value counts: (n...) for whole tokens, (n, s...) with ``channels_first``, or any
            shape with as many axes as x that broadcasts to it. Elsewhere the output and all gradients are 0. A mask of
            tokens leaves the statistics of those that it keeps as they are; one of features leaves features out.
        lengths: (n,), or (n, axes of space): the mask of samples that are padded at the end.
        backend: see :func:`normkit.backend`.

    Returns:
        Of the shape of x.

    Raises:
        RuntimeError: an input or parameters that do not fit ``normalized_shape``.
        ValueError: a residual of another shape; an unknown name; several sizes with ``channels_first``; a mask or
            lengths that do not fit.

    >>> import torch, normkit as nk
    >>> nk.functional.layer_norm(torch.tensor([[1.0, 3.0]]), (2,), eps=1e-12).tolist()
    [[-1.0, 1.0]]

    Do not expect it to keep the scale of a token: what a feature means relative to other samples is lost.

    Source: Ba, Kiros & Hinton 2016, arXiv:1607.06450.
    """
    if isinstance(x, Proxy):
        return traced_as_call(layer_norm, locals())
    over = OVER_CHANNELS if channels_first else SPEC.over
    if mask is not None or lengths is not None:
        x, residual, mask = blanked(SPEC.name, over, x, residual, mask, lengths, trailing=len(normalized_shape))
    if channels_first:
        single_axis(SPEC, normalized_shape)
        by_torch = lambda: over_channels(x, lambda rows: F.layer_norm(rows, normalized_shape, weight, bias, eps))
    else:
        by_torch = lambda: F.layer_norm(x, normalized_shape, weight, bias, eps)
    return normalize(
        SPEC,
        x,
        weight,
        bias,
        by_torch=by_torch,
        over=over,
        trailing=len(normalized_shape),
        sizes=tuple(normalized_shape),
        eps=eps,
        residual=residual,
        activation=activation,
        backend=backend,
        mask=mask,
    )


class LayerNorm(Norm, nn.LayerNorm, spec=SPEC):
    """Standardise each sample over its last axes, or over the channels of (n, c, s...); scale, shift, add, activate.

    ``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)`` with the biased variance.

    Args:
        normalized_shape: the sizes of the last axes; an int is one axis.
        eps: added to the variance.
        elementwise_affine: learn ``weight`` and ``bias``, both of shape ``normalized_shape``.
        bias: with ``elementwise_affine``, learn ``bias`` too.
        device: of the parameters.
        dtype: of the parameters.
        channels_first: normalise over axis 1 of (n, c, s...), in and out, with no permuting by hand.
        activation: a name, a module or its class, or ``None``; a child module of the layer.
        backend: see :func:`normkit.backend`.

    Shapes: input, ``residual`` and output (n..., c...), or (n, c, s...). ``forward(input, *, residual=None, mask=None,
    lengths=None)``: the mask of tokens (True: keep), (n...) or (n, s...), or the lengths of padded samples, (n,).

    Raises:
        RuntimeError: an input that does not end in ``normalized_shape``.
        ValueError: several sizes with ``channels_first``.

    >>> import torch, normkit as nk
    >>> nk.LayerNorm(64, channels_first=True)(torch.randn(2, 64, 7, 7)).shape
    torch.Size([2, 64, 7, 7])

    Source: Ba, Kiros & Hinton 2016, arXiv:1607.06450.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        channels_first: bool = False,
        activation: Activation | type[nn.Module] = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        if channels_first:
            single_axis(SPEC, self.normalized_shape)
        self.channels_first = channels_first
        self._set_options(activation, backend)

    @classmethod
    def for_channels(
        cls, num_channels: int, *, dim: int, channels_first: bool | None = None, **options: Any
    ) -> nn.Module:
        return cls(num_channels, channels_first=dim > 1 if channels_first is None else channels_first, **options)

    def forward(
        self,
        input: Tensor,
        *,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """(n..., c...) -> the same; ``residual`` (same shape) is added before the activation.

        ``mask`` or ``lengths`` say what is padding: see :func:`normkit.functional.layer_norm`.
        """
        shape, eps = self.normalized_shape, self.eps
        weight, bias = self._parameter("weight"), self._parameter("bias")
        if mask is None and lengths is None:
            y = None
            if not self.channels_first:
                y = self._straight(input, residual, torch.layer_norm, input, shape, weight, bias, eps)
            if y is None:
                over = OVER_CHANNELS if self.channels_first else None
                y = self._by_kernels(
                    input, residual, weight, bias, eps, over=over, trailing=len(shape), sizes=tuple(shape)
                )
            if y is not None:
                return y
        return layer_norm(
            input,
            shape,
            weight,
            bias,
            eps,
            channels_first=self.channels_first,
            activation=self.activation,
            residual=residual,
            mask=mask,
            lengths=lengths,
            backend=self.backend,
        )

    def _extra_options(self) -> list[str]:
        return [*(["channels_first=True"] if self.channels_first else []), *super()._extra_options()]
