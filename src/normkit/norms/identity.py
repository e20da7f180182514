"""Identity: no norm at all, with the same options. The baseline that every norm is compared with."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy

from normkit.dispatch import normalize
from normkit.epilogue import Activation
from normkit.norm import Norm, traced_as_call
from normkit.vocabulary.spec import Spec

SPEC = Spec(
    name="identity",
    summary="No norm: the input as it is, with the same options as the norms.",
    over=None,
    center=False,
    laws=frozenset({"sample", "channel", "restores"}),
    twin="torch.nn.Identity",
    paper="",
    aliases=("none", ""),
)


def identity(
    x: Tensor, *, activation: Activation = None, residual: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """``y = activation(x + residual)``: what is left of a norm layer without its norm.

    Args:
        x: of any shape.
        activation: ``"relu"``, ``"leaky_relu"``, ``"silu"``, ``"gelu"``, a callable, or ``None``.
        residual: of the shape of x, added before the activation.
        backend: see :func:`normkit.backend`.

    Returns:
        Of the shape of x.

    Raises:
        ValueError: a residual of another shape; an unknown name.

    >>> import torch, normkit as nk
    >>> nk.functional.identity(torch.tensor([-1.0, 2.0]), activation="relu").tolist()
    [0.0, 2.0]
    """
    if isinstance(x, Proxy):
        return traced_as_call(identity, locals())
    return normalize(
        SPEC,
        x,
        None,
        None,
        by_torch=lambda: x,
        reference=lambda: x,
        residual=residual,
        activation=activation,
        backend=backend,
    )


class Identity(Norm, nn.Identity, spec=SPEC):
    """The input as it is, plus ``residual``, through ``activation``; a drop-in for ``torch.nn.Identity``.

    Args:
        args: ignored, as in torch.
        activation: a name, a module or its class, or ``None``; a child module of the layer.
        backend: see :func:`normkit.backend`.
        kwargs: ignored, as in torch.

    Shapes: input, ``residual`` and output are the same. ``forward(input, *, residual=None)``.

    When not to use it: as the baseline for what a weight and a bias alone can do. It has neither.

    >>> import torch, normkit as nk
    >>> nk.Identity(64, activation="relu")(torch.tensor([-1.0, 2.0])).tolist()
    [0.0, 2.0]
    """

    def __init__(
        self,
        *args: Any,
        activation: Activation | type[nn.Module] = None,
        backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._set_options(activation, backend)

    @classmethod
    def for_channels(
        cls, num_channels: int, *, dim: int, device: Any = None, dtype: Any = None, **options: Any
    ) -> nn.Module:
        return cls(num_channels, **options)  # what every norm takes says nothing to one without parameters

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """Any shape -> the same; ``residual`` (same shape) is added before the activation."""
        return identity(input, activation=self.activation, residual=residual, backend=self.backend)
