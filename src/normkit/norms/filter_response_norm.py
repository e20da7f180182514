"""Filter response norm: rescale each channel of each sample by its root mean square over space; and its activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from normkit.dispatch import normalize
from normkit.epilogue import Activation
from normkit.norm import Norm, affine, along_channels, traced_as_call, widened
from normkit.statistics.masking import blanked
from normkit.vocabulary.spec import Spec

SPEC = Spec(
    name="filter_response_norm",
    summary="Each channel of each sample by its root mean square over space; made for the activation TLU behind it.",
    over="n c [s...]",
    center=False,
    laws=frozenset({"scale", "sample_scale", "channel_scale", "sample", "channel"}),
    twin=None,
    paper="Singh & Krishnan 2019, arXiv:1911.09737",
    aliases=("frn", "filterresponse"),
    shorthand="activation",
)


def filter_response_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    activation: Activation = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Divide each channel of each sample by its root mean square over space; scale, shift; add; activate.

    ``y = activation(x / sqrt(mean(x²) + eps) * weight + bias + residual)``.

    Args:
        x: (n, c, s...).
        weight: (c,), or ``None`` for 1.
        bias: (c,), or ``None`` for 0.
        eps: added to the mean square.
        activation: ``"relu"``, ``"leaky_relu"``, ``"silu"``, ``"gelu"``, a callable, or ``None``.
        residual: (n, c, s...), added after the affine step and before the activation.
        mask: of bool, True where a value counts: (n, s...), or any shape with as many axes as x that broadcasts to it.
            The mean square is over the values that count; elsewhere the output and all gradients are 0.
        lengths: (n,), or (n, axes of space): the mask of samples that are padded at the end.
        backend: see :func:`normkit.backend`.

    Returns:
        Of the shape of x.

    Raises:
        ValueError: an input without spatial axes; a residual of another shape; an unknown name; a mask or lengths that
            do not fit.

    >>> import torch, normkit as nk
    >>> nk.functional.filter_response_norm(torch.tensor([[[3.0, 3.0]]])).tolist()
    [[[0.9999999403953552, 0.9999999403953552]]]

    Source: Singh & Krishnan 2019, arXiv:1911.09737.
    """
    if isinstance(x, Proxy):
        return traced_as_call(filter_response_norm, locals())
    if x.dim() < 3:
        raise ValueError(
            f"filter_response_norm: the input {tuple(x.shape)} has no spatial axes, and it pools over nothing else.\n"
            "  give it (n, c, s...), or choose a norm that pools channels: rms_norm, layer_norm"
        )
    if mask is not None or lengths is not None:
        x, residual, mask = blanked(SPEC.name, SPEC.over, x, residual, mask, lengths)

    def by_torch() -> Tensor:
        wide, *parameters = widened(x, weight, bias)
        space = tuple(range(2, x.dim()))
        return affine(wide * torch.rsqrt(wide.square().mean(space, keepdim=True) + eps), *parameters).to(x.dtype)

    return normalize(
        SPEC,
        x,
        weight,
        bias,
        by_torch=by_torch,
        eps=eps,
        residual=residual,
        activation=activation,
        backend=backend,
        mask=mask,
    )


class ThresholdedLinearUnit(nn.Module):
    """Thresholded linear unit: ``y = max(x, tau)`` with a learned threshold per channel; the ReLU where tau is 0.

    Filter response norm does not centre, so its output may be far from 0: a threshold that is learned finds it.

    Args:
        num_features: channels, along axis 1.
        device: of ``tau``.
        dtype: of ``tau``, which starts at 0.

    Shapes: input and output (n, c, s...).

    >>> import torch, normkit as nk
    >>> nk.ThresholdedLinearUnit(1)(torch.tensor([[-1.0], [2.0]])).tolist()
    [[0.0], [2.0]]

    When not to use it: behind a norm that centres; there a bias before a ReLU is the same.

    Source: Singh & Krishnan 2019, arXiv:1911.09737.
    """

    def __init__(
        self, num_features: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.tau = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        """(n, c, s...) -> the same."""
        return torch.maximum(input, along_channels(self.tau.to(input.dtype), input))

    def extra_repr(self) -> str:
        """The channels."""
        return str(self.num_features)


class FilterResponseNorm(Norm, nn.Module, spec=SPEC):
    """Divide each channel of each sample by its root mean square over space; scale, shift, add, activate.

    ``y = activation(x / sqrt(mean(x²) + eps) * weight + bias + residual)``.

    Args:
        num_features: channels.
        eps: added to the mean square; the paper learns it where maps have one pixel, which this layer does not.
        affine: learn ``weight`` and ``bias``, both (c,).
        device: of the parameters.
        dtype: of the parameters.
        activation: ``"tlu"`` for the :class:`ThresholdedLinearUnit` of the paper, another name, a module or its class,
            or ``None``; a child module of the layer. ``normkit.create("frn:tlu", 64)`` is short for it.
        backend: see :func:`normkit.backend`.

    Shapes: input, ``residual`` and output (n, c, s...). ``forward(input, *, residual=None, mask=None, lengths=None)``.

    Raises:
        ValueError: an input without spatial axes; a residual of another shape; an unknown activation or backend.

    >>> import torch, normkit as nk
    >>> frn = nk.FilterResponseNorm(3, activation="tlu")
    >>> y = frn(torch.randn(2, 3, 4, 4) * 5)
    >>> bool(y.min() >= 0), [name for name, _ in frn.named_parameters()]
    (True, ['weight', 'bias', 'activation.tau'])

    When not to use it: maps of one pixel, of which only the sign remains; a ReLU behind it in the place of the TLU,
    where channels that are negative throughout are lost, because nothing centres them.

    Source: Singh & Krishnan 2019, arXiv:1911.09737.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-6,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation | type[nn.Module] = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.affine = affine
        for name in ("weight", "bias"):
            self.register_parameter(
                name, nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if affine else None
            )
        self.reset_parameters()
        if activation == "tlu":
            activation = ThresholdedLinearUnit(num_features, device, dtype)
        self._set_options(activation, backend)

    def forward(
        self,
        input: Tensor,
        *,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """(n, c, s...) -> the same; ``residual`` (same shape) is added before the activation.

        ``mask`` or ``lengths`` say what is padding: see :func:`normkit.functional.filter_response_norm`.
        """
        return filter_response_norm(
            input,
            self.weight,
            self.bias,
            self.eps,
            activation=self.activation,
            residual=residual,
            mask=mask,
            lengths=lengths,
            backend=self.backend,
        )

    weight: Tensor | None
    bias: Tensor | None

    def _extra_options(self) -> list[str]:
        own: list[Any] = [self.num_features, f"eps={self.eps}", f"affine={self.affine}"]
        return [*map(str, own), *super()._extra_options()]
