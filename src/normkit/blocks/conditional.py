"""Norms whose scale and shift depend on a condition: a class, or features of anything else."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normkit.blocks.modulation import Modulated, Modulation, kept, over_space, scaled
from normkit.norm import along_channels
from normkit.norms.batch_norm import BatchNorm1d, BatchNorm2d
from normkit.norms.instance_norm import InstanceNorm2d


class _Conditional(Modulated):
    """A norm without weights, then ``(weight + scale(condition)) * x + bias + shift(condition)``."""

    kind: ClassVar[Any]

    def __init__(
        self,
        num_features: int,
        num_classes: int | None = None,
        condition_features: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        name, where = type(self).__name__, {"device": device, "dtype": dtype}
        for own in ("affine", "bias", "activation"):
            if own in options:
                raise TypeError(
                    f"{name}: {own}={options[own]!r} belongs to the norm inside, and here weight and bias depend on "
                    "the condition.\n  leave it out; put an activation behind the layer"
                )
        self.norm = self.kind(num_features, affine=False, **options, **where)
        self.weight = nn.Parameter(torch.ones(num_features, **where))  # type: ignore[arg-type]
        self.bias = nn.Parameter(torch.zeros(num_features, **where))  # type: ignore[arg-type]
        self.offsets = Modulation(name, num_features, num_classes, condition_features, **where)  # type: ignore[arg-type]

    def reset_parameters(self) -> None:
        """Weight 1, bias and offsets 0, running statistics as new."""
        self.norm.reset_parameters()
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        self.offsets.reset_parameters()

    def forward(
        self,
        input: Tensor,
        condition: Tensor,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """(n, c, s...) and a condition for each sample -> (n, c, s...); masks are those of the plain norm."""
        keep = kept(type(self).__name__, self.kind.spec.over, input, mask, lengths)
        y = self.norm(input) if keep is None else self.norm(input, mask=keep)
        scale, shift = (over_space(part, y) for part in self.offsets(condition, len(input)))
        return scaled(y, along_channels(self.weight, y) + scale, along_channels(self.bias, y) + shift, keep)


class ConditionalBatchNorm2d(_Conditional):
    """Batch norm of (n, c, h, w) whose scale and shift depend on a condition of each sample.

    ``y = (weight + scale(z)) * (x - mean) / sqrt(var + eps) + bias + shift(z)``, with ``scale`` and ``shift`` rows of a
    table (z is a class) or one linear map (z is a vector), both 0 at the start: there the layer is plain batch norm,
    and may replace one in a trained network. Statistics are over all conditions together.

    Args:
        num_features: channels, c.
        num_classes: conditions are class numbers: (n,) of int64.
        condition_features: conditions are vectors: (n, condition_features). Give one of the two.
        device: of parameters and buffers.
        dtype: of the parameters; running statistics are float32 or better.
        options: of the batch norm inside: ``eps``, ``momentum``, ``track_running_stats``, ``statistics``, ``backend``.

    Shapes: input and output (n, c, h, w). ``forward(input, condition, *, mask=None, lengths=None)``.

    Raises:
        ValueError: both kinds of condition or neither; a condition that does not fit the samples.
        TypeError: an option that the conditions take the place of (``affine``, ``bias``, ``activation``).

    >>> import torch, normkit as nk
    >>> norm, x, classes = nk.ConditionalBatchNorm2d(8, num_classes=10), torch.randn(4, 8, 5, 5), torch.arange(4)
    >>> bool(torch.allclose(norm(x, classes), nk.BatchNorm2d(8)(x), atol=1e-6))
    True

    :func:`normkit.freeze_` freezes the running statistics of the norm inside, and with ``affine`` the ``weight``,
    ``bias`` and offsets around it; :func:`normkit.convert_` puts another norm inside.

    When not to use it: where conditions change the statistics themselves, as different sources of data do: see
    :class:`normkit.statistics.PerDomain`; where most conditions have few samples, since a row learns from its own.

    Source: de Vries, Strub, Mary, Larochelle, Pietquin & Courville 2017, arXiv:1707.00683.
    """

    kind = BatchNorm2d


class ConditionalBatchNorm1d(_Conditional):
    """Batch norm of (n, c) or (n, c, l) whose scale and shift depend on a condition: see ConditionalBatchNorm2d."""

    kind = BatchNorm1d


class ConditionalInstanceNorm2d(_Conditional):
    """Instance norm of (n, c, h, w) whose scale and shift depend on a condition: see :class:`ConditionalBatchNorm2d`.

    ``y = (weight + scale(z)) * (x - mean) / sqrt(var + eps) + bias + shift(z)``, mean and variance of each channel of
    each sample. With class numbers it is one style per class; with vectors it is what StyleGAN calls adaptive instance
    norm (Karras, Laine & Aila 2019, arXiv:1812.04948).

    >>> import torch, normkit as nk
    >>> norm = nk.ConditionalInstanceNorm2d(8, condition_features=16)
    >>> norm(torch.randn(4, 8, 5, 5), torch.randn(4, 16)).shape
    torch.Size([4, 8, 5, 5])

    When not to use it: where the contrast of a sample carries the answer; for a style that is a picture of its own:
    :class:`normkit.AdaptiveInstanceNorm`.

    Source: Dumoulin, Shlens & Kudlur 2017, arXiv:1610.07629.
    """

    kind = InstanceNorm2d
