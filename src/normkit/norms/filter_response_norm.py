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
    learned_eps: Tensor | None = None,
    activation: Activation = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Divide each channel of each sample by its root mean square over space; scale, shift; add; activate.

    ``y = activation(x / sqrt(mean(x²) + eps) * weight + bias + residual)``.

    Where ``learned_eps`` is given, epsilon is ``|eps| + |learned_eps|``.

    Args:
        x: (n, c, s...).
        weight: (c,), or ``None`` for 1.
        bias: (c,), or ``None`` for 0.
        eps: added to the mean square.
        learned_eps: (1,), a parameter, for maps of few pixels; ``None``: epsilon is ``eps``.
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

    total: float | Tensor = eps
    if learned_eps is not None:
        total = abs(eps) + learned_eps.abs().to(torch.promote_types(learned_eps.dtype, torch.float32))

    def by_torch() -> Tensor:
        wide, *parameters = widened(x, weight, bias)
        space = tuple(range(2, x.dim()))
        return affine(wide * torch.rsqrt(wide.square().mean(space, keepdim=True) + total), *parameters).to(x.dtype)

    return normalize(
        SPEC,
        x,
        weight,
        bias,
        by_torch=by_torch,
        eps=total,
        composite=learned_eps is not None,  # kernels give no derivative by epsilon
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

    Where epsilon is learned, it is ``|eps| + |learned_eps|``.

    Args:
        num_features: channels.
        eps: added to the mean square.
        affine: learn ``weight`` and ``bias``, both (c,).
        device: of the parameters.
        dtype: of the parameters.
        activation: ``"tlu"`` for the :class:`ThresholdedLinearUnit` of the paper, another name, a module or its class,
            or ``None``; a child module of the layer. ``normkit.create("frn:tlu", 64)`` is short for it.
        backend: see :func:`normkit.backend`.
        learned_eps: where a learned part of epsilon starts, for maps of one pixel or few (the paper: 1e-4): one number
            for the layer, (1,), under the key ``learned_eps``; torch's operators compute. ``None``: epsilon is fixed.

    Shapes: input, ``residual`` and output (n, c, s...). ``forward(input, *, residual=None, mask=None, lengths=None)``.

    Raises:
        ValueError: an input without spatial axes; a residual of another shape; an unknown activation or backend; a
            ``learned_eps`` that is not above 0.

    >>> import torch, normkit as nk
    >>> frn = nk.FilterResponseNorm(3, activation="tlu")
    >>> y = frn(torch.randn(2, 3, 4, 4) * 5)
    >>> bool(y.min() >= 0), [name for name, _ in frn.named_parameters()]
    (True, ['weight', 'bias', 'activation.tau'])

    >>> x = torch.tensor([[[0.003]], [[0.03]]])  # maps of one pixel
    >>> nk.FilterResponseNorm(1)(x).flatten().tolist()[0] > 0.9  # only the sign remains
    True
    >>> nk.FilterResponseNorm(1, learned_eps=1e-2)(x).flatten().tolist()[0] < 0.1  # with a greater epsilon, the size
    True

    When not to use it: maps of one pixel, without ``learned_eps``: only the sign remains of them; a ReLU behind it in
    the place of the TLU, where channels that are negative throughout are lost, because nothing centres them.

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
        learned_eps: float | None = None,
    ) -> None:
        super().__init__()
        if learned_eps is not None and not learned_eps > 0:
            raise ValueError(f"FilterResponseNorm: learned_eps={learned_eps}; start it above 0, as 1e-4, or give None")
        self.num_features = num_features
        self.eps = eps
        self.affine = affine
        self.eps_start = learned_eps
        for name in ("weight", "bias"):
            self.register_parameter(
                name, nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if affine else None
            )
        self.register_parameter(
            "learned_eps", None if learned_eps is None else nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        )
        self.reset_parameters()
        if activation == "tlu":
            activation = ThresholdedLinearUnit(num_features, device, dtype)
        self._set_options(activation, backend)

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, the learned part of epsilon as at the start."""
        super().reset_parameters()
        if self.learned_eps is not None and self.eps_start is not None:
            nn.init.constant_(self.learned_eps, self.eps_start)

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
            learned_eps=self.learned_eps,
            activation=self.activation,
            residual=residual,
            mask=mask,
            lengths=lengths,
            backend=self.backend,
        )

    weight: Tensor | None
    bias: Tensor | None
    learned_eps: Tensor | None

    def _extra_options(self) -> list[str]:
        own: list[Any] = [self.num_features, f"eps={self.eps}", f"affine={self.affine}"]
        own += [] if self.eps_start is None else [f"learned_eps={self.eps_start}"]
        return [*map(str, own), *super()._extra_options()]
