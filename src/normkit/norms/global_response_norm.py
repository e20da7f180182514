"""Global response norm: the channels of a sample compete, each by its share of the energy; a residual is built in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from normkit.dispatch import normalize
from normkit.epilogue import Activation
from normkit.norm import Norm, affine, doubled, traced_as_call, widened
from normkit.vocabulary.spec import Spec

SPEC = Spec(
    name="global_response_norm",
    summary="Each channel of a sample by its share of the energy of all channels, added to the input.",
    over=None,
    pools="space, then channels",
    center=False,
    laws=frozenset({"sample"}),
    twin=None,
    paper="Woo et al. 2023, arXiv:2301.00808",
    aliases=("grn", "globalresponse"),
)


def global_response_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    channels_axis: int = 1,
    activation: Activation = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Multiply each channel of a sample by its norm over the mean norm of all channels; scale, shift, add the input.

    ``y = activation(x * share * weight + bias + x + residual)`` with ``share = |x| / (mean(|x|) + eps)``, where ``|x|``
    is the 2-norm of one channel of one sample over space, and the mean is over the channels.

    Args:
        x: (n, c, s...), or (n, s..., c) with ``channels_axis=-1``.
        weight: (c,), or ``None`` for 1.
        bias: (c,), or ``None`` for 0.
        eps: added to the mean norm.
        channels_axis: 1 or -1.
        activation: ``"relu"``, ``"leaky_relu"``, ``"silu"``, ``"gelu"``, a callable, or ``None``.
        residual: of the shape of x, added before the activation.
        backend: see :func:`normkit.backend`.

    Returns:
        Of the shape of x.

    Raises:
        RuntimeError: parameters that do not broadcast against x.
        ValueError: a residual of another shape; an unknown name; another ``channels_axis``.

    >>> import torch, normkit as nk
    >>> nk.functional.global_response_norm(torch.tensor([[[3.0, 4.0], [0.0, 15.0]]]), eps=0.0).tolist()
    [[[4.5, 6.0], [0.0, 37.5]]]

    Source: Woo et al. 2023, arXiv:2301.00808.
    """
    if isinstance(x, Proxy):
        return traced_as_call(global_response_norm, locals())
    if channels_axis not in (1, -1):
        raise ValueError(f"global_response_norm: channels_axis={channels_axis}; choose 1 for (n, c, s...) or -1")
    axis = channels_axis % x.dim()
    space = tuple(a for a in range(1, x.dim()) if a != axis)
    first = axis == 1

    def by_torch() -> Tensor:
        wide, *parameters = widened(x, weight, bias)
        size = torch.linalg.vector_norm(wide, dim=space, keepdim=True) if space else wide.abs()
        share = size / (size.mean(axis, keepdim=True) + eps)
        return (affine(wide * share, *parameters, channels_first=first) + wide).to(x.dtype)

    def reference() -> Tensor:
        wide, *parameters = doubled(x, weight, bias)
        squares = wide.square().sum(space, keepdim=True) if space else wide.square()
        size = torch.where(squares > 0, squares, 1).sqrt() * (squares > 0)  # the slope of sqrt at 0 is infinite
        share = size / (size.sum(axis, keepdim=True) / x.shape[axis] + eps)
        return (affine(wide * share, *parameters, channels_first=first) + wide).to(x.dtype)

    return normalize(
        SPEC,
        x,
        weight,
        bias,
        by_torch=by_torch,
        reference=reference,
        eps=eps,
        residual=residual,
        activation=activation,
        backend=backend,
    )


class GlobalResponseNorm(Norm, nn.Module, spec=SPEC):
    """Multiply each channel of a sample by its share of the energy, scale, shift, add the input: ConvNeXt V2's.

    ``y = activation(x * share * weight + bias + x + residual)`` with ``share = |x| / (mean(|x|) + eps)``, where ``|x|``
    is the 2-norm of one channel of one sample over space, and the mean is over the channels.

    Args:
        num_features: channels.
        eps: added to the mean norm.
        device: of the parameters.
        dtype: of the parameters; ``weight`` and ``bias``, both (c,), start at 0: the layer starts as the identity.
        channels_axis: 1 for (n, c, s...), -1 for (n, s..., c) as inside a ConvNeXt block.
        activation: a name, a module or its class, or ``None``; a child module of the layer.
        backend: see :func:`normkit.backend`.

    Shapes: input, ``residual`` and output (n, c, s...). ``forward(input, *, residual=None)``.

    Raises:
        ValueError: another ``channels_axis``; a residual of another shape; an unknown activation or backend.

    >>> import torch, normkit as nk
    >>> x = torch.randn(2, 8, 4, 4)
    >>> nk.GlobalResponseNorm(8)(x).equal(x)
    True

    When not to use it: as the only norm of a network. It starts as the identity and bounds nothing: it keeps channels
    different from each other, behind another norm.

    Source: Woo et al. 2023, arXiv:2301.00808.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        channels_axis: int = 1,
        activation: Activation | type[nn.Module] = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.channels_axis = channels_axis
        self.weight = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.reset_parameters()
        self._set_options(activation, backend)

    def reset_parameters(self) -> None:
        """Weight and bias 0: the identity."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """(n, c, s...) -> the same; ``residual`` (same shape) is added before the activation."""
        return global_response_norm(
            input,
            self.weight,
            self.bias,
            self.eps,
            channels_axis=self.channels_axis,
            activation=self.activation,
            residual=residual,
            backend=self.backend,
        )

    def _extra_options(self) -> list[str]:
        own: list[Any] = [self.num_features, f"eps={self.eps}"]
        own += [] if self.channels_axis == 1 else [f"channels_axis={self.channels_axis}"]
        return [*map(str, own), *super()._extra_options()]
