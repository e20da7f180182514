"""A generator and a discriminator as one module, with the norm of an arm on either side, and the step they take."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from normkit.blocks import judge
from normkit.lab import initial
from normkit.lab.errors import LabError, nearest
from normkit.statistics import Virtual
from normkit.statistics.per_domain import domain
from normkit.statistics.virtual import reference_batch

Layer = Callable[[int], nn.Module]
SIDES = ("none", "generator", "discriminator", "both")
STATISTICS = ("separated", "mixed")
WEIGHTED = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
REFERENCE = 64
"""Samples of the fixed reference batch of virtual batch norm."""
SETTLING = 15
"""Power iterations before the first step: as many as torch's spectral norm takes when it is attached."""


class Adversaries(nn.Module):
    """Both networks; ``forward`` is the generator alone, noise (n, z) to samples (n, ...).

    mixed: the discriminator sees real and generated samples as one batch, with one pair of statistics, instead of one
    batch of each. The reference batch of virtual batch norm is noise that is drawn once, the same in every arm.
    """

    reference: Tensor

    def __init__(self, generator: nn.Module, discriminator: nn.Module, noise: int, mixed: bool = False) -> None:
        super().__init__()
        self.generator, self.discriminator, self.mixed = generator, discriminator, mixed
        fixed = torch.randn(REFERENCE, noise, generator=torch.Generator().manual_seed(0))
        self.register_buffer("reference", fixed)

    def forward(self, noise: Tensor) -> Tensor:
        """Generated samples."""
        virtual = any(isinstance(getattr(m, "statistics", None), Virtual) for m in self.generator.modules())
        with reference_batch(self.generator, self.reference) if virtual else contextlib.nullcontext():
            return self.generator(noise)

    def judge(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of real and of generated samples; spectral norm goes one step of power iteration for both."""
        with nn.utils.parametrize.cached():
            return judge(self.discriminator, real, fake, mixed=self.mixed)

    def judge_fake(self, real: Tensor, fake: Tensor) -> Tensor:
        """The logits of generated samples alone; where both share their statistics the real ones have to be there."""
        if self.mixed:
            return self.judge(real, fake)[1]
        with domain(1):
            return self.discriminator(fake)


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, noise: Tensor, real: Tensor) -> Tensor:
    """Discriminator, then generator (the loss that does not saturate); returns the discriminator's loss.

    Goodfellow et al. 2014, arXiv:1406.2661. The noise of the batch gives a shape and no values: it is drawn anew in
    every step. One optimizer serves both, as torch's leave parameters without a gradient alone.
    """
    assert isinstance(model, Adversaries)
    fake = model(torch.randn_like(noise))
    real_logits, fake_logits = model.judge(real, fake.detach())
    loss = F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()
    _descend(optimizer, loss, model.discriminator)
    _descend(optimizer, F.softplus(-model.judge_fake(real, fake)).mean(), model.generator)
    return loss.detach()


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor, part: nn.Module) -> None:
    optimizer.zero_grad()
    loss.backward(inputs=list(part.parameters()))
    optimizer.step()


def adversaries(
    norm_layer: Layer,
    generator: Callable[[Layer], nn.Module],
    discriminator: Callable[[Layer], nn.Module],
    noise: int,
    side: str,
    spectral: str,
    statistics: str,
) -> Adversaries:
    """Both networks of an arm; LabError for a word that is none of the choices."""
    for key, word, known in (
        ("side", side, SIDES[1:]),
        ("spectral", spectral, SIDES),
        ("statistics", statistics, STATISTICS),
    ):
        if word not in known:
            raise LabError(f"{key}:{word} is unknown{nearest(str(word), known)}; choose from: {', '.join(known)}")
    plain = lambda features: nn.Identity()
    model = Adversaries(
        generator(norm_layer if side in ("generator", "both") else plain),
        discriminator(norm_layer if side in ("discriminator", "both") else plain),
        noise,
        mixed=statistics == "mixed",
    )
    for name in ("generator", "discriminator"):
        if spectral in (name, "both"):
            for layer in [m for m in getattr(model, name).modules() if isinstance(m, WEIGHTED)]:
                spectral_norm(layer)
    return model


@torch.no_grad()
def draw_weights(model: nn.Module, drawn: torch.Generator) -> None:
    """He's weights (2 / fan_in), to which every spectral norm then finds the largest singular value."""
    initial.he(model, drawn)
    for layer in model.modules():
        if nn.utils.parametrize.is_parametrized(layer, "weight"):
            for _ in range(SETTLING):
                _ = layer.weight  # in training every look at the weight is one power iteration
