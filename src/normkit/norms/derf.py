"""Derf: a learned error function in the place of layer norm. It pools nothing, so it has no statistics at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from normkit.dispatch import normalize
from normkit.epilogue import Activation
from normkit.norm import Norm, affine, doubled, single_axis, traced_as_call
from normkit.vocabulary.spec import Spec

SPEC = Spec(
    name="derf",
    summary="A learned error function in the place of layer norm; element by element, no statistics.",
    over=None,
    center=False,
    laws=frozenset({"sample", "channel"}),
    twin=None,
    paper="Chen, Lu, Zhu, Sun & Liu 2025, arXiv:2512.10938",
    aliases=("dynamicerf",),
    shorthand="alpha_init",
)


def derf(
    x: Tensor,
    alpha: Tensor,
    shift: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    channels_first: bool = False,
    activation: Activation = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``y = activation(erf(alpha * x + shift) * weight + bias + residual)``.

    Args:
        x: (n..., c...), or (n, c, s...) with ``channels_first``.
        alpha: one number, (1,).
        shift: one number, (1,).
        weight: (c...), or ``None`` for 1.
        bias: (c...), or ``None`` for 0.
        channels_first: weight and bias run along axis 1.
        activation: ``"relu"``, ``"leaky_relu"``, ``"silu"``, ``"gelu"``, a callable, or ``None``.
        residual: of the shape of x, added after the affine step and before the activation.
        backend: see :func:`normkit.backend`.

    Returns:
        Of the shape of x.

    Raises:
        RuntimeError: parameters that do not broadcast against x.
        ValueError: a residual of another shape; an unknown name.

    >>> import torch, normkit as nk
    >>> nk.functional.derf(torch.tensor([0.0, 100.0]), torch.tensor([0.5]), torch.zeros(1)).tolist()
    [0.0, 1.0]

    Source: Chen, Lu, Zhu, Sun & Liu 2025, arXiv:2512.10938.
    """
    if isinstance(x, Proxy):
        return traced_as_call(derf, locals())

    def by_torch() -> Tensor:
        return affine(torch.erf(alpha * x + shift), weight, bias, channels_first=channels_first)

    def reference() -> Tensor:
        inside = alpha.double() * x.double() + shift.double()
        return affine(1.0 - torch.special.erfc(inside), *doubled(weight, bias), channels_first=channels_first).to(
            x.dtype
        )

    return normalize(
        SPEC,
        x,
        weight,
        bias,
        by_torch=by_torch,
        reference=reference,
        residual=residual,
        activation=activation,
        backend=backend,
    )


class Derf(Norm, nn.Module, spec=SPEC):
    """Dynamic erf: ``y = activation(erf(alpha * x + shift) * weight + bias + residual)``, all four learned.

    Args:
        normalized_shape: the sizes of the last axes; an int is one axis.
        alpha_init: where ``alpha`` starts; ``shift`` starts at 0.
        elementwise_affine: learn ``weight`` and ``bias``, both of shape ``normalized_shape``.
        device: of the parameters.
        dtype: of the parameters.
        channels_first: ``weight`` and ``bias`` run along axis 1 of (n, c, s...).
        activation: a name, a module or its class, or ``None``; a child module of the layer.
        backend: see :func:`normkit.backend`.

    Shapes: input, ``residual`` and output (n..., c...), or (n, c, s...). ``forward(input, *, residual=None)``.

    Raises:
        ValueError: several sizes with ``channels_first``.

    >>> import torch, normkit as nk
    >>> nk.Derf(8)(torch.zeros(2, 8)).abs().max().item()
    0.0

    When not to use it: in the place of batch norm in convolutional networks; it is made for the norms of Transformers,
    and takes the magnitude of the input as it comes: without a norm anywhere, that magnitude may grow with depth.

    Source: Chen, Lu, Zhu, Sun & Liu 2025, arXiv:2512.10938.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        alpha_init: float = 0.5,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        channels_first: bool = False,
        activation: Activation | type[nn.Module] = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        if channels_first:
            single_axis(SPEC, shape)
        self.normalized_shape = shape
        self.alpha_init = alpha_init
        self.elementwise_affine = elementwise_affine
        self.channels_first = channels_first
        self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.shift = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        for name in ("weight", "bias"):
            parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if elementwise_affine else None
            self.register_parameter(name, parameter)
        self.reset_parameters()
        self._set_options(activation, backend)

    @classmethod
    def for_channels(
        cls, num_channels: int, *, dim: int, channels_first: bool | None = None, **options: Any
    ) -> nn.Module:
        return cls(num_channels, channels_first=dim > 1 if channels_first is None else channels_first, **options)

    def reset_parameters(self) -> None:
        """alpha as given, shift 0, weight 1, bias 0."""
        super().reset_parameters()
        nn.init.constant_(self.alpha, self.alpha_init)
        nn.init.zeros_(self.shift)

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """(n..., c...) -> the same; ``residual`` (same shape) is added before the activation."""
        return derf(
            input,
            self.alpha,
            self.shift,
            self.weight,
            self.bias,
            channels_first=self.channels_first,
            activation=self.activation,
            residual=residual,
            backend=self.backend,
        )

    def _extra_options(self) -> list[str]:
        own = [f"{self.normalized_shape}", f"alpha_init={self.alpha_init}"]
        if self.channels_first:
            own.append("channels_first=True")
        return [*own, *super()._extra_options()]
