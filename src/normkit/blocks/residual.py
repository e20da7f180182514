"""Residual blocks without normalization: what keeps the sum of a shortcut and a branch from growing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


class NormalizerFreeResidual(nn.Module):
    """``y = shortcut(x) + alpha * gain * branch(x / beta)``: the residual block of normalizer-free networks.

    ``beta`` is the deviation that the input is expected to have, so that the branch sees variance 1;
    :func:`expected_deviations` counts it up. ``alpha`` is how much each block adds. ``gain`` is one learned number.

    Args:
        branch: keeps the variance of its input: :class:`ScaledWSConv2d` with the gains of its activations.
        alpha: fixed; 0.2 in the paper.
        beta: fixed.
        shortcut: a module for where shapes change, which sees ``x / beta``; ``None``: x itself.
        gain_init: where the gain starts; 0 makes every block the identity at first (SkipInit), as the paper does.

    Shapes: those of ``branch``, whose output has the shape of the shortcut's.

    >>> import torch, normkit as nk
    >>> block = nk.blocks.NormalizerFreeResidual(nk.blocks.ScaledWSLinear(64, 64), gain_init=1.0)
    >>> bool(0.9 < block(torch.randn(256, 64)).var() < 1.2)
    True

    When not to use it: with a norm in the branch, which undoes ``beta``.

    Source: Brock, De & Smith 2021, arXiv:2101.08692.
    """

    def __init__(
        self,
        branch: nn.Module,
        *,
        alpha: float = 0.2,
        beta: float = 1.0,
        shortcut: nn.Module | None = None,
        gain_init: float = 0.0,
    ) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.alpha, self.beta, self.gain_init = alpha, beta, gain_init
        self.gain = nn.Parameter(torch.full((), gain_init))

    def forward(self, input: Tensor) -> Tensor:
        """The sum."""
        scaled = input / self.beta
        kept = input if self.shortcut is None else self.shortcut(scaled)
        return kept + self.alpha * self.gain * self.branch(scaled)

    def extra_repr(self) -> str:
        """What is fixed."""
        return f"alpha={self.alpha}, beta={self.beta:.5g}"


def expected_deviations(transitions: Iterable[bool], alpha: float = 0.2) -> Iterator[float]:
    """``beta`` of one block after the other: the deviation of its input, where every branch adds variance ``alpha²``.

    Args:
        transitions: for each block, whether it has a shortcut that changes shapes: there the variance starts anew.
        alpha: as in :class:`NormalizerFreeResidual`.

    >>> import normkit as nk
    >>> [round(beta, 3) for beta in nk.blocks.expected_deviations([True, False, False, True, False])]
    [1.0, 1.02, 1.039, 1.058, 1.02]

    Source: Brock, De & Smith 2021, arXiv:2101.08692.
    """
    variance = 1.0
    for transition in transitions:
        yield math.sqrt(variance)
        variance = (1.0 if transition else variance) + alpha**2


class SkipInit(nn.Module):
    """``y = shortcut(x) + scale * branch(x)`` with one learned ``scale`` that starts at 0, as a shortcut alone.

    Args:
        branch: any.
        shortcut: a module for where shapes change; ``None``: x itself.
        init: where the scale starts.

    Shapes: those of ``branch``, whose output has the shape of the shortcut's.

    >>> import torch, normkit as nk
    >>> x = torch.randn(4, 8)
    >>> nk.blocks.SkipInit(torch.nn.Linear(8, 8))(x).equal(x)
    True

    When not to use it: with a zero last layer in the branch (Fixup), for then nothing ever moves.

    Source: De & Smith 2020, arXiv:2002.10444; with an init of 0 and no norm it is ReZero, Bachlechner et al. 2020,
    arXiv:2003.04887.
    """

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None, init: float = 0.0) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.scale = nn.Parameter(torch.full((), init))

    def forward(self, input: Tensor) -> Tensor:
        """The sum."""
        kept = input if self.shortcut is None else self.shortcut(input)
        return kept + self.scale * self.branch(input)


ReZero = SkipInit
"""Found twice, in the same year: see :class:`SkipInit`."""


class LayerScale(nn.Module):
    """``y = x * scale`` with a learned ``scale`` per channel that starts small: behind the branch of a residual block.

    Args:
        num_features: channels.
        init: where the scale starts; 0.1 up to 18 blocks, 1e-5 up to 24, 1e-6 beyond, in the paper.
        channels_first: they are axis 1, otherwise the last axis.

    Shapes: input and output (n, c, s...), or (n..., c).

    >>> import torch, normkit as nk
    >>> nk.blocks.LayerScale(2, init=0.5)(torch.ones(1, 2)).tolist()
    [[0.5, 0.5]]

    When not to use it: in the place of a norm in networks of a few blocks, where a start so small costs steps.

    Source: Touvron, Cord, Sablayrolles, Synnaeve & Jégou 2021, arXiv:2103.17239.
    """

    def __init__(self, num_features: int, init: float = 1e-5, *, channels_first: bool = False) -> None:
        super().__init__()
        self.channels_first = channels_first
        self.scale = nn.Parameter(torch.full((num_features,), init))

    def forward(self, input: Tensor) -> Tensor:
        """(n, c, s...), or (n..., c) -> the same."""
        scale = self.scale.view(-1, *[1] * (input.dim() - 2)) if self.channels_first else self.scale
        return input * scale

    def extra_repr(self) -> str:
        """The channels."""
        return f"{self.scale.numel()}, channels_first={self.channels_first}"


class Scale(nn.Module):
    """``y = activation(x * scale)`` with one number: what is left of a norm in a network without normalization.

    Args:
        scale: where it starts; in the ``state_dict`` either way.
        learned: it is a parameter.
        activation: a module that the norm had, or ``None``.

    Shapes: input and output are the same.

    >>> import torch, normkit as nk
    >>> nk.blocks.Scale(0.2)(torch.ones(2)).tolist()
    [0.20000000298023224, 0.20000000298023224]

    When not to use it: for a number per channel, which is :class:`LayerScale`.
    """

    scale: Tensor

    def __init__(self, scale: float = 1.0, learned: bool = False, activation: nn.Module | None = None) -> None:
        super().__init__()
        value = torch.full((), scale)
        if learned:
            self.scale = nn.Parameter(value)
        else:
            self.register_buffer("scale", value)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same."""
        y = input * self.scale
        return y if self.activation is None else self.activation(y)
