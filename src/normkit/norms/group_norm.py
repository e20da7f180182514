"""Group norm: standardise groups of channels within each sample; independent of the batch."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.overrides import has_torch_function_variadic

from normkit.dispatch import normalize
from normkit.epilogue import Activation
from normkit.norm import Norm, like, traced_as_call
from normkit.statistics.masking import blanked
from normkit.vocabulary.spec import Spec

SPEC = Spec(
    name="group_norm",
    summary="Groups of channels within each sample; the batch may be as small as one.",
    over="n (g [c]) [s...]",
    center=True,
    laws=frozenset({"scale", "shift", "sample_scale", "sample_shift", "sample"}),
    twin="torch.nn.GroupNorm",
    paper="Wu & He 2018, arXiv:1803.08494",
    aliases=("group", "gn"),
    shorthand="num_groups",
)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: Activation = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Standardise each group of channels of each sample, over its channels and space; scale, shift; add; activate.

    ``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)`` with the biased variance.

    Args:
        x: (n, c, s...).
        num_groups: a divisor of c; 1 pools all channels, c is instance norm.
        weight: (c,), or ``None`` for 1.
        bias: (c,), or ``None`` for 0.
        eps: added to the variance.
        activation: ``"relu"``, ``"leaky_relu"``, ``"silu"``, ``"gelu"``, a callable, or ``None``.
        residual: (n, c, s...), added after the affine step and before the activation.
        mask: of bool, True where a value counts: (n, s...), or any shape with as many axes as x that broadcasts to it.
            A group is standardised over its values that count; elsewhere the output and all gradients are 0.
        lengths: (n,), or (n, axes of space): the mask of samples that are padded at the end.
        backend: see :func:`normkit.backend`.

    Returns:
        (n, c, s...).

    Raises:
        RuntimeError: channels that do not divide into the groups; parameters that do not fit.
        ValueError: one value in all; a residual of another shape; an unknown name; a mask or lengths that do not fit.

    >>> import torch, normkit as nk
    >>> nk.functional.group_norm(torch.tensor([[1.0, 3.0, 10.0, 30.0]]), 2, eps=1e-12).tolist()
    [[-1.0, 1.0, -1.0, 1.0]]

    Do not use it where a group would hold a single value, as on (n, c) with num_groups=c: the output is the bias.

    Source: Wu & He 2018, arXiv:1803.08494.
    """
    if isinstance(x, Proxy):
        return traced_as_call(group_norm, locals())
    if mask is not None or lengths is not None:
        x, residual, mask = blanked(SPEC.name, SPEC.over, x, residual, mask, lengths)
    return normalize(
        SPEC,
        x,
        weight,
        bias,
        by_torch=lambda: _by_torch(x, num_groups, weight, bias, eps),
        eps=eps,
        groups=num_groups,
        residual=residual,
        activation=activation,
        backend=backend,
        mask=mask,
    )


class GroupNorm(Norm, nn.GroupNorm, spec=SPEC):
    """Standardise groups of channels of (n, c, s...) within each sample, then scale, shift, add, activate.

    ``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)``, mean and (biased) variance over the
    channels of the group and space.

    Args:
        num_groups: a divisor of ``num_channels``.
        num_channels: channels.
        eps: added to the variance.
        affine: learn ``weight`` and ``bias``, both (c,).
        device: of the parameters.
        dtype: of the parameters.
        bias: with ``affine``, learn ``bias`` too.
        activation: a name, a module or its class, or ``None``; a child module of the layer.
        backend: see :func:`normkit.backend`.

    Shapes: input, ``residual`` and output (n, c, s...). ``forward(input, *, residual=None, mask=None, lengths=None)``:
    the mask (True: keep), (n, s...), or the lengths of padded samples, (n,) or (n, axes of space).

    Raises:
        ValueError: ``num_channels`` does not divide into ``num_groups``; the message lists the divisors.

    >>> import torch, normkit as nk
    >>> nk.GroupNorm(32, 64, activation="silu")(torch.randn(1, 64, 8, 8)).shape
    torch.Size([1, 64, 8, 8])

    Differs from ``torch.nn.GroupNorm``: warns once when a group holds a single value (torch returns noise).

    Source: Wu & He 2018, arXiv:1803.08494.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: Activation | type[nn.Module] = None,
        backend: str | None = None,
    ) -> None:
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(_indivisible(num_groups, num_channels))
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        self._set_bias(bias)
        self._set_options(activation, backend)
        self._watchful = num_groups == num_channels  # otherwise no group can hold a single value

    @classmethod
    def for_channels(cls, num_channels: int, *, dim: int, num_groups: int = 32, **options: Any) -> nn.Module:
        return cls(num_groups, num_channels, **options)

    def forward(
        self,
        input: Tensor,
        *,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """(n, c, s...) -> (n, c, s...); ``residual`` (same shape) is added before the activation.

        ``mask`` or ``lengths`` say what is padding: see :func:`normkit.functional.group_norm`.
        """
        y, affine = None, (self._parameter("weight"), self._parameter("bias"), self.eps)
        if mask is None and lengths is None:
            y = self._straight(input, residual, _by_torch, input, self.num_groups, *affine)
            if y is None:
                y = self._by_kernels(input, residual, *affine, groups=self.num_groups)
        if y is None:
            y = group_norm(
                input,
                self.num_groups,
                *affine,
                activation=self.activation,
                residual=residual,
                mask=mask,
                lengths=lengths,
                backend=self.backend,
            )
        if self._watchful and not torch.compiler.is_compiling():
            self._warn_of_single_values(input)
        return y

    def _warn_of_single_values(self, input: Tensor) -> None:
        if input.dim() < 2 or input.shape[2:].numel() != 1:
            return
        self._watchful = False
        warnings.warn(
            f"GroupNorm: every group holds a single value (input {tuple(input.shape)}, num_groups={self.num_groups}), "
            "so the output is the bias and the input is lost. Choose fewer groups.",
            stacklevel=3,
        )


def _by_torch(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    watched = torch.compiler.is_compiling() or has_torch_function_variadic(x, weight, bias)
    if watched or x.dim() < 2 or x.numel() <= num_groups:  # torch refuses a single value in each group
        return like(F.group_norm(x, num_groups, weight, bias, eps), x)
    # The same without what takes as long as all that is ours around it.
    return like(torch.group_norm(x, num_groups, weight, bias, eps), x)


def _indivisible(num_groups: int, num_channels: int) -> str:
    divisors = ", ".join(str(n) for n in range(1, num_channels + 1) if num_channels % n == 0)
    return (
        f"group_norm: num_channels ({num_channels}) must be divisible by num_groups ({num_groups})\n"
        f'  pattern "{SPEC.over}"\n'
        f"  choose num_groups from the divisors of {num_channels}: {divisors}"
    )
