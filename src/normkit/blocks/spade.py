"""SPADE: a norm whose scale and shift at every place come from a map of what is to be there."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normkit.blocks.modulation import Modulated, kept, scaled
from normkit.create import Name, create


class SPADE(Modulated):
    """Normalise without weights, then scale and shift every place by what two convolutions make of a layout.

    ``y = (1 + scale(m)) * normalised(x) + shift(m)``, ``scale`` and ``shift`` 3x3 convolutions of ``relu(conv3x3(m))``;
    the layout m is brought to the size of x by its nearest places. The layout itself is never normalised: instance norm
    would erase one that is the same everywhere.

    Args:
        num_features: channels of the input, c.
        layout_channels: channels of the layout, k: usually one per class.
        hidden: channels between the convolutions.
        norm: a name as :func:`normkit.create` takes it, of a norm that can be had without weights: ``"batch"``,
            ``"batch:synchronized"`` (as in the paper), ``"instance"``, ``"group:8"``.
        eps: added to the variance.
        device: of parameters and buffers.
        dtype: of the parameters.

    Shapes: input and output (n, c, h, w); layout (n, k, a, b), of floats. ``forward(input, layout, *, mask=None,
    lengths=None)``: which places of the input count.

    Raises:
        ValueError: an unknown norm; a layout that does not fit.
        TypeError: a norm that has no option ``affine``.

    >>> import torch, normkit as nk
    >>> layout = torch.nn.functional.one_hot(torch.randint(5, (2, 32, 32)), 5).movedim(-1, 1).float()
    >>> nk.SPADE(16, layout_channels=5, hidden=8)(torch.randn(2, 16, 8, 8), layout).shape
    torch.Size([2, 16, 8, 8])

    When not to use it: where a condition is the same at every place (:class:`normkit.ConditionalBatchNorm2d` costs far
    less); where convolutions with ``hidden`` channels at full resolution are too much.

    Source: Park, Liu, Wang & Zhu 2019, arXiv:1903.07291.
    """

    def __init__(
        self,
        num_features: int,
        layout_channels: int,
        hidden: int = 128,
        norm: Name = "batch",
        *,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm: Any = create(norm, num_features, dim=2, eps=eps, affine=False, **where)
        self.shared = nn.Conv2d(layout_channels, hidden, 3, padding=1, **where)
        self.modulation = nn.Conv2d(hidden, 2 * num_features, 3, padding=1, **where)

    def forward(
        self, input: Tensor, layout: Tensor, *, mask: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """(n, c, h, w) and (n, k, a, b) -> (n, c, h, w)."""
        if layout.dim() != 4 or len(layout) != len(input) or layout.shape[1] != self.shared.in_channels:
            raise ValueError(
                f"SPADE: the input is {tuple(input.shape)}, the layout {tuple(layout.shape)}.\n"
                f"  give a layout ({len(input)}, {self.shared.in_channels}, a, b): as many samples, of any size"
            )
        keep = kept("SPADE", self.norm.spec.over, input, mask, lengths)
        y = self.norm(input) if keep is None else self.norm(input, mask=keep)
        layout = F.interpolate(layout, size=input.shape[2:], mode="nearest")
        scale, shift = self.modulation(self.shared(layout).relu()).chunk(2, 1)
        return scaled(y, 1 + scale, shift, keep)
