"""The composed layers: recurrent ones against torch's LSTM without a norm, Transformer layers against torch's with the
same norm.

Limits are those that the project has set itself; a table shows what keeps them, and no test asserts a time.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normkit as nk
from normkit.bench.block_peers import LoopedLSTM, torchs_transformer
from normkit.bench.cell import Effort, Record, time_steps
from normkit.bench.clock import Step
from normkit.bench.parity import Agreement, objection, to_json
from normkit.bench.peers import BASELINE

OURS, SLOW_PATH = "normkit", "torch, no fast path"
FACTOR = 4
"""A loop over 64 steps multiplies rounding, and not by the same in two ways to write it."""
GROUPS = ("recurrent", "transformer_layer")
STEPS, SAMPLES, UNITS = 64, 64, 256
"""Of the recurrent layers: time steps, samples, units and features."""
TOKENS, BATCH, WIDTH, HEADS, INNER = 128, 16, 256, 4, 1024
"""Of the Transformer layers."""


@dataclass(frozen=True)
class Block:
    """One layer with one norm, in training (forward and backward) or in evaluation (forward)."""

    group: str
    layer: str
    """The class, as normkit and torch call it."""
    norm: str
    """As an arm of a comparison is written: ``batch+ffn:batch``, ``batch+placement:input``."""
    limit: float | None
    """How many times as long as torch's it may take; ``None``: nobody has said."""
    training: bool = True

    @property
    def name(self) -> str:
        """``LSTM layer``, ``TransformerEncoderLayer layer evaluation``."""
        return f"{self.layer} {self.norm}" + ("" if self.training else " evaluation")

    @property
    def told(self) -> str:
        """What a reader should know."""
        if self.group == "recurrent":
            return f"{STEPS} steps, {SAMPLES} samples, {UNITS} units; torch's has no norm"
        return f"{BATCH} x {TOKENS} tokens, width {WIDTH}, {HEADS} heads, {INNER} inside, GELU, pre-norm, no dropout"

    def options(self) -> dict[str, Any]:
        """Of the layer: its norm, and what stands behind a + in its name."""
        norm, *others = self.norm.split("+")
        options: dict[str, Any] = {"norm": norm}
        for other in others:
            key, _, value = other.partition(":")
            options[{"ffn": "ffn_norm"}.get(key, key)] = value
        return options


def _all() -> Iterator[Block]:
    for norm, limit in (
        *(("layer", 1.6), ("rms", None)),
        *((f"batch:per_step:{STEPS}", 2.5), ("batch", 2.5), ("batch+placement:input", 2.5)),
    ):
        yield Block("recurrent", "LSTM", norm, limit)
    for norm in ("layer", "rms", "batch", "batch+ffn:batch", "power:1", "progressive:100000"):
        yield Block("transformer_layer", "TransformerEncoderLayer", norm, 1.1)
    for norm in ("layer", "rms", "batch"):
        yield Block("transformer_layer", "TransformerDecoderLayer", norm, 1.1)
    for norm in ("layer", "rms", "batch"):
        yield Block("transformer_layer", "TransformerEncoderLayer", norm, None, training=False)


BLOCKS: dict[str, Block] = {block.name: block for block in _all()}


@dataclass
class Peer:
    """One implementation, on the tensors that it is timed on."""

    block: nn.Module
    """Holds the parameters."""
    call: nn.Module
    given: tuple[Tensor, ...]
    training: bool
    fast_path: bool = True
    """Whether torch may take the way that it has for evaluation."""

    def __post_init__(self) -> None:
        self.call.train(self.training)
        self.leaves = tuple(x.detach().clone().requires_grad_(self.training) for x in self.given)

    def forward(self) -> Tensor:
        """The output; of a recurrent layer that of all time steps."""
        with torch.inference_mode(not self.training), _fast_path(self.fast_path):
            y = self.call(*self.leaves)
        return y[0] if isinstance(y, tuple) else y

    def backward(self, y: Tensor) -> tuple[Tensor, ...]:
        """Gradients of inputs and parameters for a fixed upstream gradient."""
        if not self.training:
            return ()
        upstream = torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).reshape(y.shape)
        return torch.autograd.grad(y, [*self.leaves, *self.block.parameters()], upstream)

    def results(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The output, and all gradients in one row, of a copy in float64 or as it is."""
        block, call = copy.deepcopy((self.block, self.call))
        given = self.given
        if dtype is not None:
            given = tuple(x.to(dtype) for x in given)
            block.to(dtype), call.to(dtype)
        own = Peer(block, call, given, self.training, self.fast_path)
        y = own.forward()
        gradients = own.backward(y)
        row = {"gradients": torch.cat([g.double().flatten() for g in gradients])} if gradients else {}
        return {"y": y.detach().double(), **row}

    def step(self) -> Step:
        """What is timed."""
        return Step(self.forward, self.backward)


@contextmanager
def _fast_path(allowed: bool) -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(allowed)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def measure(name: str, effort: Effort, device: str = "cpu") -> list[Record]:
    """One record per implementation, in float32: torch's, normkit's, and in evaluation torch's off its fast path.

    normkit's is compared with the same computation written otherwise (`block_peers`) in float64, output and gradients:
    it may be FACTOR times as far off as that is itself in float32.
    """
    block = BLOCKS[name]
    about = {
        "kind": "block",
        "op": block.name,
        "layer": block.layer,
        "norm": block.norm,
        "training": block.training,
        "dtype": "float32",
        "layout": "contiguous",
        "device": device,
        "reason": block.told,
    }
    peers, truth = _peers(block, device)
    right, plain = truth.results(torch.float64), truth.results()
    eps = torch.finfo(torch.float32).eps
    allowed = {what: FACTOR * _distance(plain[what], exact) + 4 * eps for what, exact in right.items()}
    records: list[Record] = []
    steps: dict[str, Step] = {}
    for implementation, peer in peers.items():
        record = {**about, "implementation": implementation, "fast_path": peer.fast_path and not block.training}
        if implementation == OURS:
            found = {
                what: Agreement(_distance(got, right[what]), allowed[what]) for what, got in peer.results().items()
            }
            record |= {"parity": to_json(found), "limit": block.limit}
            if (wrong := objection(found)) is not None:
                return [{**record, "state": "refused", "why": f"parity is red, so nothing is timed: {wrong}"}]
        records.append({**record, "state": "measured"})
        steps[implementation] = peer.step()
    for record, told in zip(records, time_steps(steps, effort, device).values(), strict=True):
        record.update(told)
    return records


def _peers(block: Block, device: str) -> tuple[dict[str, Peer], Peer]:
    """By implementation, torch's first; and the one that says what is right."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    made = (_recurrent if block.group == "recurrent" else _transformer)(block, device)
    torch.set_rng_state(state)
    return made


def _recurrent(block: Block, device: str) -> tuple[dict[str, Peer], Peer]:
    own = _shaken(nk.LSTM(UNITS, UNITS, **block.options()).to(device))
    plain = nn.LSTM(UNITS, UNITS).to(device)
    given = (torch.randn(STEPS, SAMPLES, UNITS, device=device),)
    written = copy.deepcopy(own)
    peer = lambda layer, call: Peer(layer, call, given, block.training)
    return {BASELINE: peer(plain, plain), OURS: peer(own, own)}, peer(written, LoopedLSTM(written))


def _transformer(block: Block, device: str) -> tuple[dict[str, Peer], Peer]:
    sizes: dict[str, Any] = {"d_model": WIDTH, "nhead": HEADS, "dim_feedforward": INNER, "dropout": 0.0}
    sizes["activation"] = F.gelu  # on which side of a ReLU's kink a value falls is a matter of rounding
    made = getattr(nk, block.layer)(**sizes, batch_first=True, placement="pre", **block.options())
    own = _shaken(made.to(device))
    tokens = torch.randn(BATCH, TOKENS, WIDTH, device=device)
    given = (tokens, torch.randn_like(tokens)) if "Decoder" in block.layer else (tokens,)
    lent = copy.deepcopy(own)
    call = torchs_transformer(lent).to(device)
    own_way = block.training or block.norm == "layer"  # on its fast path torch takes any norm for a layer norm
    peer = lambda layer, call, fast: Peer(layer, call, given, block.training, fast)
    peers = {BASELINE: peer(lent, call, own_way), OURS: peer(own, own, False)}
    if not block.training and own_way:
        peers[SLOW_PATH] = peer(lent, call, False)
    return peers, peer(lent, call, False)


@torch.no_grad()
def _shaken(layer: nn.Module) -> nn.Module:
    """With no parameter at 0 or 1, where a wrong one would not show."""
    for parameter in layer.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def _distance(got: Tensor, right: Tensor) -> float:
    return float((got.cpu() - right.cpu()).norm() / right.norm()) if got.shape == right.shape else math.inf
