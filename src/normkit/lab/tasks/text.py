"""text: a character language model, a small Transformer, on the text inside CPython's `pydoc_data.topics`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.lab.data import Data, as_data
from normkit.lab.errors import LabError
from normkit.lab.experiment import ADAM_RATES, Experiment, Metric
from normkit.lab.norm_layer import NormLayer
from normkit.lab.tasks.tokens import Shape, initial_weights, transformers

# Fixed by a pilot before any comparison (1 seed; layer, naive batch, FFN-BN, PowerNorm and PRepBN at 0.003 to 1): to
# know how often each character occurs is worth 4.5 bits, where every arm stays at a rate that is too great; 4.2 bits
# take 50 to 150 steps at a rate that is not, and are in reach of a quick look.
TARGET = 4.2
# As many as fit into six minutes; the whole list is in docs/recurrent-and-attention.md.
ARMS = ("layer", "batch", "batch+ffn:batch", "progressive:50%:10%")
# 40 blocks of 8 windows are held out: 64 windows for validation (an evaluation must stay cheap), 256 for testing.
BLOCK, HELD_OUT, HELD_PER_VALIDATION = 8, 40, 5


def _bits(outputs: Tensor, targets: Tensor) -> Tensor:
    return _loss(outputs, targets) / math.log(2)


def _loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


BITS = Metric("bits per character", _bits, higher_is_better=False, unit="bits per character")


def text(depth: int = 2, width: int = 64, context: int = 64, heads: int = 4) -> Experiment:
    """`depth` pre-norm layers of `width`, windows of `context` characters, AdamW, bits per character."""
    trunk = transformers(Shape("text", depth, width, heads, context), causal=True)
    corpus, symbols = _corpus()

    def model(
        norm_layer: NormLayer, dropout: float = 0.0, placement: str = "before", ffn: str = "none", qk: str = "none"
    ) -> nn.Module:
        return nn.Sequential(
            nn.Embedding(symbols, width),
            trunk(norm_layer, dropout, placement, ffn, qk),
            nn.Linear(width, symbols),
        )

    return Experiment(
        name="text",
        title=f"{depth}-layer Transformer on the text of Python's own help",
        description=(
            f"A character model with {depth} layers of width {width} and {heads} heads reads windows of {context} "
            f"characters from the help topics inside CPython ({len(corpus)} characters, {symbols} symbols; the text "
            "differs a little between Python versions). Norms see every position as one sample, (n * t, width). For "
            "layer and RMS norm that changes nothing. Batch norm in training takes its statistics over all positions "
            "of a window, so a position is scaled by numbers to which later characters contributed: a faint view of "
            "the future that layer norm does not have. In evaluation, which is all that counts here, it uses running "
            "statistics and the model is strictly causal. The same holds for what RepBN and PRepBN take from the "
            "batch, and for PowerNorm while it warms up. An arm with placement:after normalises the sums (post-norm)."
        ),
        model=model,
        data=_windows(corpus, context),
        target=TARGET,
        loss=_loss,
        metric=BITS,
        arms=ARMS,
        baseline="layer",
        optimizer="adamw",
        rates=ADAM_RATES,
        steps=250,
        quick_steps=55,
        eval_every=10,
        batch_size=8,
        initial=initial_weights,
        probed=16,
    )


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
