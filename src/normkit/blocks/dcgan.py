"""DCGAN with a norm of one's choice on each side: a generator and a discriminator of strided convolutions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm as spectral

from normkit.create import factory
from normkit.statistics.per_domain import domain

NormLayer = Callable[[int], nn.Module]
BATCH: NormLayer = factory("batch")
REAL, FAKE = 0, 1
"""The domains of :func:`normkit.domain` in which a discriminator sees real and generated images."""


class Generator(nn.Module):
    """Images from noise: a projection to a small map, then transposed convolutions that double it, to tanh.

    ``noise -> (n, width * 2^k, smallest, smallest) -> ... -> (n, channels, size, size)``, ``size = smallest *
    2^(k+1)``; a norm and ReLU behind every layer but the last, which has tanh alone. Weights start with deviation 0.02.

    Args:
        noise: numbers per sample.
        channels: of the images.
        size: side of the images, ``smallest`` times a power of 2.
        width: channels before the last layer; each layer before has twice as many.
        smallest: side of the first map.
        norm_layer: channels to a norm, as :func:`normkit.factory` makes them; ``None``: no norm. For virtual batch norm
            ``nk.factory("batch:virtual")``, and the calls inside ``nk.reference_batch(generator, z_ref)``.

    Shapes: input (n, noise); output (n, channels, size, size), between -1 and 1.

    Raises:
        ValueError: a size that is not ``smallest`` times a power of 2.

    >>> import torch, normkit as nk
    >>> nk.blocks.Generator(16, size=8, smallest=2, width=8)(torch.randn(4, 16)).shape
    torch.Size([4, 1, 8, 8])

    When not to use it: for large or varied images; later architectures are far better. It is small and well studied.

    Source: Radford, Metz & Chintala 2016, arXiv:1511.06434.
    """

    def __init__(
        self,
        noise: int,
        channels: int = 1,
        size: int = 64,
        width: int = 64,
        smallest: int = 4,
        norm_layer: NormLayer | None = BATCH,
    ) -> None:
        super().__init__()
        widths = [width * 2**power for power in reversed(range(_doublings("Generator", size, smallest)))]
        layers = _normed(lambda bias: nn.ConvTranspose2d(noise, widths[0], smallest, bias=bias), widths[0], norm_layer)
        layers.append(nn.ReLU())
        for before, after in pairwise(widths):
            grow = lambda bias, a=before, b=after: nn.ConvTranspose2d(a, b, 4, 2, 1, bias=bias)
            layers += [*_normed(grow, after, norm_layer), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.ConvTranspose2d(widths[-1], channels, 4, 2, 1), nn.Tanh())
        initialise_(self)

    def forward(self, noise: Tensor) -> Tensor:
        """(n, noise) -> (n, channels, size, size)."""
        return self.layers(noise[..., None, None])


class Discriminator(nn.Module):
    """How real images look: strided convolutions that halve the map, leaky ReLU (0.2), one logit.

    ``(n, channels, size, size) -> ... -> (n, width * 2^k, smallest, smallest) -> (n,)``; a norm behind every
    convolution but the first and the last. Weights start with deviation 0.02.

    Args:
        channels: of the images.
        size: side of the images, ``smallest`` times a power of 2.
        width: channels behind the first convolution; each one after has twice as many.
        smallest: side of the last map.
        norm_layer: channels to a norm; ``None``: no norm. For statistics of their own of real and generated images
            ``nk.factory("batch", statistics=nk.statistics.PerDomain(2))``, with :meth:`judge`.
        spectral_norm: divide every weight by its largest singular value (torch's parametrization; Miyato et al. 2018,
            arXiv:1802.05957).

    Shapes: input (n, channels, size, size); output (n,), logits: above 0 means real.

    Raises:
        ValueError: a size that is not ``smallest`` times a power of 2.

    >>> import torch, normkit as nk
    >>> discriminator = nk.blocks.Discriminator(size=8, smallest=2, width=8, norm_layer=None, spectral_norm=True)
    >>> discriminator(torch.randn(4, 1, 8, 8)).shape
    torch.Size([4])

    When not to use it: batch norm here makes the logit of one image depend on the others of its batch, which gradient
    penalties forbid, and CIFAR-10's samples are the worse for (Miyato et al. 2018, table 2).

    Source: Radford, Metz & Chintala 2016, arXiv:1511.06434.
    """

    def __init__(
        self,
        channels: int = 1,
        size: int = 64,
        width: int = 64,
        smallest: int = 4,
        norm_layer: NormLayer | None = BATCH,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        widths = [width * 2**power for power in range(_doublings("Discriminator", size, smallest))]
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for before, after in pairwise(widths):
            shrink = lambda bias, a=before, b=after: nn.Conv2d(a, b, 4, 2, 1, bias=bias)
            layers += [*_normed(shrink, after, norm_layer), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, smallest))
        initialise_(self)
        if spectral_norm:
            for layer in self.layers:
                if isinstance(layer, nn.Conv2d):
                    spectral(layer)

    def forward(self, images: Tensor) -> Tensor:
        """(n, channels, size, size) -> (n,)."""
        return self.layers(images).flatten()

    def judge(self, real: Tensor, fake: Tensor, *, mixed: bool = False) -> tuple[Tensor, Tensor]:
        """The logits of real and of generated images: see :func:`judge`."""
        return judge(self, real, fake, mixed=mixed)


def judge(discriminator: nn.Module, real: Tensor, fake: Tensor, *, mixed: bool = False) -> tuple[Tensor, Tensor]:
    """The logits of real and of generated samples, (n, ...) and (m, ...) -> (n,) and (m,).

    Separated (the default): each in a batch of its own, so that a batch norm in training normalises it by its own
    statistics; layers with ``statistics=PerDomain(2)`` keep running statistics for each (0: real, 1: generated),
    others one pair that both move. ``mixed``: as one batch, normalised by one pair of statistics.

    Args:
        discriminator: samples to logits.
        real: real samples.
        fake: generated ones.
        mixed: as one batch.

    >>> import torch, normkit as nk
    >>> discriminator = nk.blocks.Discriminator(size=8, smallest=2, width=8)
    >>> real, fake = discriminator.judge(torch.randn(4, 1, 8, 8), torch.randn(6, 1, 8, 8))
    >>> len(real), len(fake)
    (4, 6)

    When not to use it: in evaluation of samples whose kind is not known; a layer with ``PerDomain`` has to be told one.
    """
    if mixed:
        logits = discriminator(torch.cat([real, fake]))
        return logits[: len(real)], logits[len(real) :]
    with domain(REAL):
        of_real = discriminator(real)
    with domain(FAKE):
        return of_real, discriminator(fake)


@torch.no_grad()
def initialise_(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Weights of convolutions from a normal distribution of deviation 0.02, biases 0, as the paper has it.

    Under spectral norm it is the learnt weight that is drawn; what the layer uses is a quotient of it.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            weight: Any = layer.weight
            if nn.utils.parametrize.is_parametrized(layer, "weight"):
                weight = layer.parametrizations.weight.original  # type: ignore[union-attr]
            nn.init.normal_(weight, std=0.02, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _normed(layer: Callable[[bool], nn.Module], channels: int, norm_layer: NormLayer | None) -> list[nn.Module]:
    """The layer and its norm; no bias in front of a norm, which has one."""
    norm = None if norm_layer is None else norm_layer(channels)
    if norm is None or isinstance(norm, nn.Identity):
        return [layer(True), *([] if norm is None else [norm])]
    return [layer(False), norm]


def _doublings(what: str, size: int, smallest: int) -> int:
    doublings = max(1, (size // max(1, smallest)).bit_length() - 1)
    if smallest < 1 or smallest * 2**doublings != size:
        raise ValueError(
            f"{what}: size={size} is not smallest={smallest} times 2, 4, 8 ...\n"
            "  choose both so that it is, as 64 and 4, or 8 and 2"
        )
    return doublings
