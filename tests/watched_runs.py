"""Small training runs that can be watched: the same bits come out of each, watched or not."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normkit as nk

STEPS = 6


class Checkpointed(nn.Module):
    """The inner block's forward runs again inside the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, x, use_reentrant=False))


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def dropout_and_batch_norm(norm: Any = nn.BatchNorm1d) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), norm(8), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(8, 3))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 4, 2),
        nk.BatchNorm2d(4, activation="relu"),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


@dataclass
class Run:
    """How a model is trained."""

    make: Callable[[], nn.Module]
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model
    optimizer: Callable[[Any], Any] = lambda parameters: torch.optim.Adam(parameters, lr=0.01)
    autocast: bool = False
    scaler: bool = False
    accumulate: int = 1
    closure: bool = False
    moves_often: int = 1
    """How often the running statistics move in one step."""


RUNS = {
    "plain": Run(plain),
    "sgd": Run(plain, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    "dropout and batch norm": Run(dropout_and_batch_norm),
    "normkit": Run(lambda: dropout_and_batch_norm(nk.BatchNorm1d)),
    "fused": Run(convolutions),
    "autocast": Run(dropout_and_batch_norm, autocast=True),
    "scaler": Run(dropout_and_batch_norm, autocast=True, scaler=True),
    "checkpointing": Run(Checkpointed, moves_often=2),
    "accumulation": Run(dropout_and_batch_norm, accumulate=3, moves_often=3),
    "closure": Run(dropout_and_batch_norm, closure=True),
    "lbfgs": Run(plain, closure=True, optimizer=lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3)),
    "compiled": Run(dropout_and_batch_norm, wrap=lambda m: torch.compile(m, backend="aot_eager")),
}


def watched(model: nn.Module, optimizer: Any, out: Path | None = None, **options: Any) -> Any:
    """Sampled at every second step, whatever it costs."""
    return nk.watch(model, optimizer, every=2, out=out, budget=None, **options)


def train(run: Run, watch: Callable[..., Any] | None, steps: int = STEPS) -> tuple[dict[str, Tensor], Any]:
    """All that a run leaves: losses, weights, buffers, the optimizer's state and the random state."""
    torch.manual_seed(1)
    inner = run.make()
    model = run.wrap(inner)
    optimizer = run.optimizer(inner.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=run.scaler)
    watching = None if watch is None else watch(model, optimizer)
    losses = []

    def one() -> Tensor:
        x, y = torch.randn(16, 6), torch.randint(3, (16,))
        with torch.autocast("cpu", torch.bfloat16) if run.autocast else contextlib.nullcontext():
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        losses.append(loss.detach())
        return loss

    for _ in range(steps):
        optimizer.zero_grad()
        if run.closure:
            optimizer.step(lambda: (optimizer.zero_grad(), one())[1])
            continue
        for _ in range(run.accumulate):
            one()
        scaler.step(optimizer)
        scaler.update()
    left = {f"loss {index}": loss for index, loss in enumerate(losses)}
    left |= {name: value.clone() for name, value in inner.state_dict().items()}
    left |= {f"gradient of {name}": p.grad.clone() for name, p in inner.named_parameters()}
    for index, state in enumerate(optimizer.state.values()):
        left |= {f"state {index} {key}": copy.deepcopy(v) for key, v in state.items() if isinstance(v, Tensor)}
    left["random state"] = torch.get_rng_state()
    return left, watching


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """What is not bit for bit the same."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]
