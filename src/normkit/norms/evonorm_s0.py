"""EvoNorm S0: norm and activation in one, found by a search; independent of the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from normkit.dispatch import normalize
from normkit.epilogue import Activation
from normkit.moments import Moments
from normkit.norm import Norm, affine, along_channels, doubled, traced_as_call, widened
from normkit.vocabulary.spec import Spec

SPEC = Spec(
    name="evonorm_s0",
    summary="A swish over the deviation of groups of channels: norm and activation in one, for any batch.",
    over=None,
    pools="groups of channels",
    center=False,
    laws=frozenset({"sample"}),
    twin=None,
    paper="Liu, Brock, Simonyan & Le 2020, arXiv:2004.02967",
    shorthand="num_groups",
)


def evonorm_s0(
    x: Tensor,
    num_groups: int,
    v: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: Activation = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Swish with a learned slope, divided by the deviation of the group; scale, shift; add; activate.

    ``y = activation(x * sigmoid(v * x) / sqrt(var + eps) * weight + bias + residual)``, where ``var`` is that of a
    group of channels of a sample, over its channels and space (biased).

    Args:
        x: (n, c, s...).
        num_groups: at most so many groups: c groups of one channel where there are fewer channels.
        v: (c,), the slope of the swish.
        weight: (c,), or ``None`` for 1.
        bias: (c,), or ``None`` for 0.
        eps: added to the variance.
        activation: a further one; ``"relu"``, ``"leaky_relu"``, ``"silu"``, ``"gelu"``, a callable, or ``None``.
        residual: (n, c, s...), added after the affine step and before ``activation``.
        backend: see :func:`normkit.backend`.

    Returns:
        Of the shape of x.

    Raises:
        ValueError: channels that do not divide into groups; a residual of another shape; an unknown name.

    >>> import torch, normkit as nk
    >>> nk.functional.evonorm_s0(torch.tensor([[[2.0, 6.0]]]), 1, torch.zeros(1), eps=0.0).tolist()
    [[[0.5, 1.5]]]

    Source: Liu, Brock, Simonyan & Le 2020, arXiv:2004.02967.
    """
    if isinstance(x, Proxy):
        return traced_as_call(evonorm_s0, locals())
    groups = min(num_groups, x.shape[1])
    refuse_groups(x.shape[1], groups)
    pooled = (2, *range(3, x.dim() + 1))

    def by_torch() -> Tensor:
        wide, slope, *parameters = widened(x, v, weight, bias)
        opened = wide.unflatten(1, (groups, -1))
        own = Moments.measure(opened, pooled)
        deviation = torch.sqrt(_spread(own.m2 / own.count.clamp(min=1), opened) + eps)
        swish = wide * torch.sigmoid(along_channels(slope, x) * wide)
        y = (swish.unflatten(1, (groups, -1)) / deviation).flatten(1, 2)
        return affine(y, *parameters).to(x.dtype)

    def reference() -> Tensor:
        wide, slope, *parameters = doubled(x, v, weight, bias)
        opened = wide.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
        mean = opened.mean(pooled, keepdim=True)
        square = (opened - mean).square().mean(pooled, keepdim=True)
        inside = along_channels(slope, x) * wide
        above, below = torch.exp(-inside.clamp(min=0)), torch.exp(inside.clamp(max=0))  # neither overflows
        swish = wide * torch.where(inside >= 0, 1 / (1 + above), below / (1 + below))
        return affine((swish.reshape(opened.shape) / (square + eps).sqrt()).reshape(x.shape), *parameters).to(x.dtype)

    return normalize(
        SPEC,
        x,
        weight,
        bias,
        by_torch=by_torch,
        reference=reference,
        eps=eps,
        groups=groups,
        residual=residual,
        activation=activation,
        backend=backend,
    )


def refuse_groups(channels: int, groups: int) -> None:
    """The message that has the divisors in it."""
    if groups < 1 or channels % groups:
        divisors = ", ".join(str(d) for d in range(1, channels + 1) if channels % d == 0)
        raise ValueError(
            f"evonorm_s0: {channels} channels do not divide into {groups} groups.\n"
            f"  choose num_groups from the divisors of {channels}: {divisors}"
        )


def _spread(statistic: Tensor, opened: Tensor) -> Tensor:
    """(n, g) as it broadcasts against (n, g, c, s...)."""
    return statistic.view(*statistic.shape, *[1] * (opened.dim() - 2))


class EvoNormS0(Norm, nn.Module, spec=SPEC):
    """Swish with a learned slope over the deviation of groups of channels: a norm that brings its activation.

    ``y = activation(x * sigmoid(v * x) / sqrt(var + eps) * weight + bias + residual)``, where ``var`` is that of a
    group of channels of a sample, over its channels and space (biased).

    Args:
        num_features: channels.
        num_groups: at most so many groups: c groups of one channel where there are fewer channels.
        eps: added to the variance.
        device: of the parameters.
        dtype: of the parameters: ``v`` and ``weight`` start at 1, ``bias`` at 0, all (c,).
        activation: a further one, which the paper does not have; a name, a module or its class, or ``None``.
        backend: see :func:`normkit.backend`.

    Shapes: input, ``residual`` and output (n, c, s...). ``forward(input, *, residual=None)``.

    Raises:
        ValueError: channels that do not divide into groups; a residual of another shape; an unknown activation or
            backend.

    >>> import torch, normkit as nk
    >>> nk.create("evonorm-s0:8", 64)(torch.randn(2, 64, 4, 4)).shape
    torch.Size([2, 64, 4, 4])

    When not to use it: before a ReLU, where it stands for both; in the place of a norm that has no activation behind
    it, as the last one of a residual branch.

    Source: Liu, Brock, Simonyan & Le 2020, arXiv:2004.02967.
    """

    activates = True

    def __init__(
        self,
        num_features: int,
        num_groups: int = 32,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation | type[nn.Module] = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        refuse_groups(num_features, min(num_groups, num_features))
        self.num_features = num_features
        self.num_groups = num_groups
        self.eps = eps
        for name in ("v", "weight", "bias"):
            self.register_parameter(name, nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)))
        self.reset_parameters()
        self._set_options(activation, backend)

    v: Tensor
    weight: Tensor
    bias: Tensor

    def reset_parameters(self) -> None:
        """v and weight 1, bias 0."""
        super().reset_parameters()
        nn.init.ones_(self.v)

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """(n, c, s...) -> the same; ``residual`` (same shape) is added after the affine step."""
        return evonorm_s0(
            input,
            self.num_groups,
            self.v,
            self.weight,
            self.bias,
            self.eps,
            activation=self.activation,
            residual=residual,
            backend=self.backend,
        )

    def _extra_options(self) -> list[str]:
        own: list[Any] = [self.num_features, f"num_groups={self.num_groups}", f"eps={self.eps}"]
        return [*map(str, own), *super()._extra_options()]
