"""RMS norm: rescale each row by its root mean square. It does not centre, so an added constant stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from normkit.dispatch import normalize
from normkit.epilogue import Activation
from normkit.norm import OVER_CHANNELS, Norm, machine_eps, over_channels, single_axis, traced_as_call
from normkit.statistics.masking import blanked
from normkit.vocabulary.spec import Spec

SPEC = Spec(
    name="rms_norm",
    summary="Each sample or token by its root mean square, without centring; cheaper than layer norm.",
    over="n... [c...]",
    center=False,
    laws=frozenset({"scale", "sample_scale", "sample"}),
    twin="torch.nn.RMSNorm",
    paper="Zhang & Sennrich 2019, arXiv:1910.07467",
    aliases=("rms",),
)


def rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    channels_first: bool = False,
    activation: Activation = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Divide by the root mean square over the last axes (or over the channels of (n, c, s...)); scale; add; activate.

    ``y = activation(x / sqrt(mean(x²) + eps) * weight + residual)``.

    Args:
        x: (n..., c...), or (n, c, s...) with ``channels_first``.
        normalized_shape: the sizes of ``c...``; one size with ``channels_first``.
        weight: of shape ``normalized_shape``, or ``None`` for 1.
        eps: added to the mean square; ``None``: the machine epsilon of the arithmetic (float32, or float64).
        channels_first: the features are axis 1, in and out.
        activation: ``"relu"``, ``"leaky_relu"``, ``"silu"``, ``"gelu"``, a callable, or ``None``.
        residual: of the shape of x, added after scaling and before the activation.
        mask: of bool, True where a value counts: (n...) for whole tokens, (n, s...) with ``channels_first``, or any
            shape with as many axes as x that broadcasts to it. Elsewhere the output and all gradients are 0. A mask of
            tokens leaves the statistics of those that it keeps as they are; one of features leaves features out.
        lengths: (n,), or (n, axes of space): the mask of samples that are padded at the end.
        backend: see :func:`normkit.backend`.

    Returns:
        Of the shape of x.

    Raises:
        RuntimeError: an input or a weight that does not fit ``normalized_shape``.
        ValueError: a residual of another shape; an unknown name; several sizes with ``channels_first``; a mask or
            lengths that do not fit.

    >>> import torch, normkit as nk
    >>> nk.functional.rms_norm(torch.tensor([[3.0, 3.0]]), (2,)).tolist()
    [[1.0, 1.0]]

    Source: Zhang & Sennrich 2019, arXiv:1910.07467.
    """
    if isinstance(x, Proxy):
        return traced_as_call(rms_norm, locals())
    over = OVER_CHANNELS if channels_first else SPEC.over
    if mask is not None or lengths is not None:
        x, residual, mask = blanked(SPEC.name, over, x, residual, mask, lengths, trailing=len(normalized_shape))
    if eps is None:
        eps = machine_eps(x.dtype)
    if channels_first:
        single_axis(SPEC, normalized_shape)
        by_torch = lambda: over_channels(x, lambda rows: F.rms_norm(rows, normalized_shape, weight, eps))
    else:
        by_torch = lambda: F.rms_norm(x, normalized_shape, weight, eps)
    return normalize(
        SPEC,
        x,
        weight,
        None,
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


class RMSNorm(Norm, nn.RMSNorm, spec=SPEC):
    """Divide each sample by the root mean square of its last axes, or of its channels; scale, add, activate.

    ``y = activation(x / sqrt(mean(x²) + eps) * weight + residual)``.

    Args:
        normalized_shape: the sizes of the last axes; an int is one axis.
        eps: added to the mean square; ``None``: the machine epsilon of the arithmetic (float32, or float64).
        elementwise_affine: learn ``weight``, of shape ``normalized_shape``.
        device: of the weight.
        dtype: of the weight.
        channels_first: normalise over axis 1 of (n, c, s...), in and out, with no permuting by hand.
        activation: a name, a module or its class, or ``None``; a child module of the layer.
        backend: see :func:`normkit.backend`.

    Shapes: input, ``residual`` and output (n..., c...), or (n, c, s...). ``forward(input, *, residual=None, mask=None,
    lengths=None)``: the mask of tokens (True: keep), (n...) or (n, s...), or the lengths of padded samples, (n,).

    Raises:
        RuntimeError: an input that does not end in ``normalized_shape``.
        ValueError: several sizes with ``channels_first``.

    >>> import torch, normkit as nk
    >>> nk.RMSNorm(512)(torch.randn(4, 16, 512)).square().mean(-1).round().unique().tolist()
    [1.0]

    When not to use it: inputs with a large common offset, which it keeps and layer norm removes.

    Source: Zhang & Sennrich 2019, arXiv:1910.07467.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        channels_first: bool = False,
        activation: Activation | type[nn.Module] = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
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

        ``mask`` or ``lengths`` say what is padding: see :func:`normkit.functional.rms_norm`.
        """
        shape, eps, weight = self.normalized_shape, self.eps, self._parameter("weight")
        if mask is None and lengths is None and isinstance(input, Tensor):
            known, y = machine_eps(input.dtype) if eps is None else eps, None
            if not self.channels_first:
                y = self._straight(input, residual, torch.rms_norm, input, shape, weight, known)
            if y is None:
                over = OVER_CHANNELS if self.channels_first else None
                y = self._by_kernels(
                    input, residual, weight, None, known, over=over, trailing=len(shape), sizes=tuple(shape)
                )
            if y is not None:
                return y
        return rms_norm(
            input,
            shape,
            weight,
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
