"""text: a character language model, a small Transformer, on the text inside CPython's `pydoc_data.topics`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.lab import initial
from normkit.lab.data import Data, as_data
from normkit.lab.errors import LabError
from normkit.lab.experiment import ADAM_RATES, Experiment, Metric

# Fixed by a pilot before any comparison (2 seeds; none, layer and batch norm): to know how often each character occurs
# is worth 4.5 bits, and 3.6 bits take more than 250 steps in every arm; 3.7 bits are in reach of a quick look.
TARGET = 3.7
# 40 blocks of 8 windows are held out: 64 windows for validation (an evaluation must stay cheap), 256 for testing.
BLOCK, HELD_OUT, HELD_PER_VALIDATION = 8, 40, 5


def _bits(outputs: Tensor, targets: Tensor) -> Tensor:
    return _loss(outputs, targets) / math.log(2)


def _loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


BITS = Metric("bits per character", _bits, higher_is_better=False, unit="bits per character")


class Block(nn.Module):
    """x + attention(norm(x)), then x + network(norm(x)); placement:after normalises the sums instead (post-norm)."""

    def __init__(self, norm_layer: Callable[[int], nn.Module], width: int, heads: int, dropout: float, placement: str):
        super().__init__()
        self.norms = nn.ModuleList([norm_layer(width), norm_layer(width)])
        self.mix = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)
        self.heads, self.placement = heads, placement

    def forward(self, x: Tensor) -> Tensor:  # (n, t, width)
        x = self._add(x, self._attend, self.norms[0])
        return self._add(x, self.network, self.norms[1])

    def _add(self, x: Tensor, part: Callable[[Tensor], Tensor], norm: nn.Module) -> Tensor:
        if self.placement == "before":
            return x + self.dropout(part(normalise(norm, x)))
        return normalise(norm, x + self.dropout(part(x)))

    def _attend(self, x: Tensor) -> Tensor:
        query, key, value = self.mix(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)  # (n, heads, t, width / heads)
        return self.merge(mixed.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Characters (n, t) int64 to logits (n, t, symbols); position t sees characters up to t."""

    def __init__(self, blocks: list[Block], final: nn.Module, symbols: int, context: int, width: int):
        super().__init__()
        self.symbol = nn.Embedding(symbols, width)
        self.position = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.Sequential(*blocks)
        self.final = final
        self.head = nn.Linear(width, symbols)

    def forward(self, characters: Tensor) -> Tensor:
        x = self.symbol(characters) + self.position[: characters.shape[1]]
        return self.head(normalise(self.final, self.blocks(x)))


def normalise(norm: nn.Module, x: Tensor) -> Tensor:
    """The norm over (n * t, width): every position is one sample."""
    return norm(x.flatten(0, -2)).view_as(x)


def text(depth: int = 2, width: int = 64, context: int = 64, heads: int = 4) -> Experiment:
    """`depth` pre-norm blocks of `width`, windows of `context` characters, AdamW, bits per character."""
    if width % heads:
        raise LabError(
            f"text: width {width} does not divide into {heads} heads; choose heads from the divisors of {width}"
        )
    corpus, symbols = _corpus()

    def model(norm_layer: Callable[[int], nn.Module], dropout: float = 0.0, placement: str = "before") -> nn.Module:
        blocks = [Block(norm_layer, width, heads, dropout, placement) for _ in range(depth)]
        return Transformer(blocks, norm_layer(width), symbols, context, width)

    return Experiment(
        name="text",
        title=f"{depth}-layer Transformer on the text of Python's own help",
        description=(
            f"A character model with {depth} blocks of width {width} and {heads} heads reads windows of {context} "
            f"characters from the help topics inside CPython ({len(corpus)} characters, {symbols} symbols; the text "
            "differs a little between Python versions). Norms see every position as one sample, (n * t, width). For "
            "layer and RMS norm that changes nothing. Batch norm in training takes its statistics over all positions "
            "of a window, so a position is scaled by numbers to which later characters contributed: a faint view of "
            "the future that layer norm does not have. In evaluation, which is all that counts here, it uses running "
            "statistics and the model is strictly causal."
        ),
        model=model,
        data=_windows(corpus, context),
        target=TARGET,
        loss=_loss,
        metric=BITS,
        optimizer="adamw",
        rates=ADAM_RATES,
        steps=600,
        quick_steps=250,
        eval_every=10,
        batch_size=8,
        initial=_initial,
    )


@torch.no_grad()
def _initial(model: nn.Module, generator: torch.Generator) -> None:
    """Gaussian weights, deviation 0.02 for embeddings (GPT-2), Glorot for linear layers."""
    initial.glorot(model, generator)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02, generator=generator)
        if isinstance(module, Transformer):
            nn.init.normal_(module.position, std=0.02, generator=generator)


def _corpus() -> tuple[Tensor, int]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise LabError(
            "the task text reads pydoc_data.topics, which this Python was built without; take another Python"
        ) from None
    characters = "".join(topics[name] for name in sorted(topics))
    symbols = {symbol: index for index, symbol in enumerate(sorted(set(characters)))}
    return torch.tensor([symbols[character] for character in characters]), len(symbols)


def _windows(corpus: Tensor, context: int) -> Data:
    """Windows without overlap. Blocks of BLOCK windows, spread evenly over the text because its topics differ, are held
    out: one in HELD_PER_VALIDATION of these for validation, the others for testing.
    """
    size = (context + 1) * BLOCK
    blocks = corpus[: len(corpus) // size * size].view(-1, BLOCK, context + 1)
    held = torch.linspace(0, len(blocks) - 1, HELD_OUT).round().long()
    for_validation = torch.arange(HELD_OUT) % HELD_PER_VALIDATION == 0
    kept = torch.ones(len(blocks), dtype=torch.bool)
    kept[held] = False
    parts = (part.flatten(0, 1) for part in (blocks[kept], blocks[held[for_validation]], blocks[held[~for_validation]]))
    return as_data(tuple((part[:, :-1], part[:, 1:]) for part in parts), "text")
