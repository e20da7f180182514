"""tokens: the Transformer that text and digits-vit share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import normkit as nk
from normkit.blocks.token_norms import over_tokens
from normkit.lab import initial
from normkit.lab.errors import LabError
from normkit.lab.norm_layer import NormLayer

DEVIATION = 0.02  # of embeddings and positions at the start, as in GPT-2


@dataclass(frozen=True)
class Shape:
    """depth: layers; width: features of a token; heads: divide the width; tokens: positions that there are."""

    task: str
    depth: int
    width: int
    heads: int
    tokens: int

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise LabError(
                f"{self.task}: width {self.width} does not divide into {self.heads} heads; choose heads from the "
                f"divisors of {self.width}"
            )


class Transformer(nn.Module):
    """Tokens (n, t, width) to the same: learned positions, layers, and a norm behind the last."""

    def __init__(self, shape: Shape, layers: list[nn.Module], final: nn.Module, causal: bool):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(shape.tokens, shape.width))
        self.layers = nn.ModuleList(layers)
        self.final = final
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        """Every token is one sample of a norm; causal: position t sees tokens up to t."""
        x = x + self.position[: x.shape[1]]
        for layer in self.layers:
            x = layer(x, is_causal=self.causal)
        return over_tokens(self.final, x)


def transformers(shape: Shape, causal: bool = False) -> Callable[..., Transformer]:
    """What the model builder of a task calls with `norm_layer` and all that an arm may ask of a Transformer."""

    def build(norm_layer: NormLayer, dropout: float, placement: str, ffn: str, qk: str) -> Transformer:
        """ffn: a norm between the two linear layers of a block; qk: one on queries and keys; "none": no such norm."""
        norms: dict[str, Any] = {"norm": norm_layer, "ffn_norm": norm_layer.of(ffn), "qk_norm": norm_layer.of(qk)}
        norms["placement"] = "pre" if placement == "before" else "post"
        sizes = (shape.width, shape.heads, 4 * shape.width, dropout)
        layers: list[nn.Module] = [
            nk.TransformerEncoderLayer(*sizes, nn.GELU(), batch_first=True, **norms) for _ in range(shape.depth)
        ]
        return Transformer(shape, layers, norm_layer(shape.width), causal)

    return build


@torch.no_grad()
def initial_weights(model: nn.Module, generator: torch.Generator) -> None:
    """Glorot's for linear layers and convolutions; Gaussian embeddings and positions."""
    initial.glorot(model, generator)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=DEVIATION, generator=generator)
        if isinstance(module, Transformer):
            nn.init.normal_(module.position, std=DEVIATION, generator=generator)
