"""What all conditional norms share: a scale and a shift that are made of a condition, and how they are applied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normkit.layout import roles
from normkit.statistics.masking import as_mask


class Modulation(nn.Module):
    """A condition to ``parts`` vectors of c numbers each: rows of a table of classes, or a linear map of features.

    Weights (and the bias of the map) start at 0, so that a conditional norm starts as the plain one.

    Args:
        owner: the layer, for messages.
        channels: c.
        num_classes: conditions are class numbers, (n,) of int64.
        condition_features: conditions are features, (n..., condition_features).
        parts: how many vectors.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: both of ``num_classes`` and ``condition_features`` or neither, or one below 1; a condition that does
            not fit.
    """

    def __init__(
        self,
        owner: str,
        channels: int,
        num_classes: int | None,
        condition_features: int | None,
        parts: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        given = num_classes if condition_features is None else condition_features
        if (num_classes is None) == (condition_features is None) or given is None or given < 1:
            raise ValueError(
                f"{owner}: num_classes={num_classes!r}, condition_features={condition_features!r}.\n"
                "  give one of them, 1 or more: num_classes where a condition is a class number, condition_features "
                "where it is a vector"
            )
        self.owner, self.parts, self.of_classes = owner, parts, num_classes is not None
        kind: Any = nn.Embedding if self.of_classes else nn.Linear
        self.map = kind(given, parts * channels, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Everything 0."""
        for parameter in self.map.parameters():
            parameter.zero_()

    def forward(self, condition: Tensor, samples: int) -> tuple[Tensor, ...]:
        """(n,) of classes or (n..., d) of features -> ``parts`` tensors (n..., c)."""
        fits = condition.dim() == 1 if self.of_classes else condition.dim() >= 2
        if not fits or len(condition) != samples or condition.is_floating_point() == self.of_classes:
            wanted = f"({samples},) of int64" if self.of_classes else f"({samples}, {self.map.in_features}) of floats"
            raise ValueError(
                f"{self.owner}: a condition of {tuple(condition.shape)}, {condition.dtype}, beside {samples} samples.\n"
                f"  give one condition per sample: {wanted}"
            )
        return self.map(condition).chunk(self.parts, -1)

    def extra_repr(self) -> str:
        """Nothing: the map says it."""
        return ""


class Modulated(nn.Module):
    """A norm without weights, ``norm``, and around it what learns scale and shift in the place of its weights."""

    norm: Any
    frozen_parameters: tuple[str, ...] = ()
    """Those that trained until :func:`normkit.freeze_` stopped them, and will again."""

    def learned(self) -> dict[str, nn.Parameter]:
        """By name, what scale and shift are made of."""
        return {name: parameter for name, parameter in self.named_parameters() if not name.startswith("norm.")}


def over_space(vector: Tensor, x: Tensor) -> Tensor:
    """(n, c) as it broadcasts against x, (n, c, s...)."""
    return vector.reshape(*vector.shape, *[1] * (x.dim() - 2))


def scaled(y: Tensor, scale: Tensor, shift: Tensor, keep: Tensor | None = None) -> Tensor:
    """``y * scale + shift`` in the precision of ``y``; 0 where ``keep`` is False, as the norm left it."""
    y = y * scale.to(y.dtype) + shift.to(y.dtype)  # y first: the output has its memory format
    return y if keep is None else torch.where(keep, y, 0)


def kept(owner: str, over: str, x: Tensor, mask: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    """Mask or lengths of a call as one mask with as many axes as x; None where nothing is masked."""
    return as_mask(x, mask, lengths, axes=roles(over, x.dim(), 1)[2], what=owner)
