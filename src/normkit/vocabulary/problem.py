"""Problem: what a kernel sees. Shapes, types and an epilogue; never which norm it serves."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

ITEM_SIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Problem:
    """One normalization as pure shape of work.

    ``rows``: statistics per run of neighbouring axes of one sample (layer, RMS, group, instance).
    ``channels``: statistics per channel over samples and space (batch).
    """

    kind: Literal["rows", "channels"]
    shape: tuple[int, ...]
    """Of the tensor."""
    strides: tuple[int, ...]
    """Of the tensor, in elements: channels-first and channels-last are the same problem with other strides."""
    view: tuple[int, ...]
    """The shape with grouped channels opened into two axes; ``pooled`` and ``weighted`` count its axes."""
    pooled: tuple[int, ...]
    weighted: tuple[int, ...]
    dtype: str
    weight_dtype: str | None
    device: str
    center: bool
    training: bool
    """Statistics are taken from the batch (always true for rows)."""
    activation: str | None
    """``relu``, ``leaky_relu``, ``silu``, ``gelu``, ``gelu_tanh``, ``None``; ``module``: nothing a kernel can fuse."""
    residual: bool
    grad: bool
    """A backward pass will follow."""

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def values(self) -> int:
        """How many values share one mean and one variance."""
        return prod(self.view[axis] for axis in self.pooled)

    @property
    def statistics(self) -> int:
        """How many means and variances there are."""
        return prod(size for axis, size in enumerate(self.view) if axis not in self.pooled)

    @property
    def bytes_moved(self) -> int:
        """The floor of memory traffic of the forward pass in bytes: read the input (and the residual) once, write once.

        A kernel that cannot keep one statistic's values on chip reads the input a second time.
        """
        return self.elements * ITEM_SIZE[self.dtype] * (3 if self.residual else 2)
