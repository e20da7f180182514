"""Models that are hard to leave alone, each with a batch and a loss: name -> (model, batch, loss)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import normkit as nk


def images(*layers: nn.Module) -> tuple[nn.Module, tuple, object]:
    """Eight channels, then the layers, then five classes."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    return model, (torch.randn(6, 3, 7, 7) * 2 + 1, torch.randint(0, 5, (6,))), F.cross_entropy


class Shared(nn.Module):
    """One batch norm, called twice on inputs that differ."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nk.BatchNorm1d(4), nn.Linear(4, 1)

    def forward(self, x):
        return self.out(self.norm(x) + self.norm(3 * x + 5))


class Words(nn.Module):
    """Integers in, a recurrent layer, layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(11, 6), nn.LSTM(6, 6, batch_first=True, dropout=0.0)
        self.norm, self.out = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, tokens):
        return self.out(self.norm(self.rnn(self.embedding(tokens))[0][:, -1]))


class Keywords(nn.Module):
    """A dict of tensors in, a dict with a loss out, as transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(4, 4), nk.RMSNorm(4)

    def forward(self, x, labels=None, mask=None):
        y = self.norm(F.dropout(self.inner(x), 0.3, self.training))
        y = y if mask is None else y * mask
        return {"loss": (y - labels).square().mean(), "logits": y}


class Pair(nn.Module):
    """Two positional inputs, of which it writes into one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x, y):
        x.add_(1.0)
        return self.norm(self.inner(x) * y)


class Remembers(nn.Module):
    """Counts its calls, keeps its last output, and draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.calls, self.last = 0, None
        self.generator = torch.Generator().manual_seed(3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.seen += 1
        self.seen = self.seen * 1.0
        y = self.norm(self.inner(x)) + 0.1 * torch.randn(x.shape, generator=self.generator) * self.calls
        self.last = y.detach()
        return y


class Recomputing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.ReLU(inplace=True))
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        return self.out(checkpoint(self.block, x, use_reentrant=False))


def regression(model: nn.Module, *inputs: torch.Tensor) -> tuple[nn.Module, tuple, object]:
    """A loss that every output can have."""
    batch = (inputs[0] if len(inputs) == 1 else inputs, torch.tensor(0.5))
    return model, batch, lambda output, target: (output - target).square().mean()


def waiting():
    model, batch, loss = images(nk.BatchNorm2d(8, momentum=0.3), nn.ReLU())
    model.accumulating = nk.accumulate_statistics(model)  # which ends with the last reference to it
    model.accumulating.__enter__()
    return model, batch, loss


def frozen():
    model, batch, loss = images(nk.BatchNorm2d(8), nn.BatchNorm2d(8).eval())
    nk.freeze_(model, filter_fn=lambda module, name: name == "1")
    return model, batch, loss


def in_double(case):
    model, (x, target), loss = case
    return model.double().to(memory_format=torch.channels_last), (x.double(), target), loss


MODELS = {
    "torch batch norm": lambda: images(nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.2)),
    "normkit batch norm": lambda: images(nk.BatchNorm2d(8, activation="relu"), nn.Dropout2d(0.2)),
    "cumulative average": lambda: images(nk.BatchNorm2d(8, momentum=None), nn.SiLU()),
    "group norm": lambda: images(nn.GroupNorm(4, 8), nk.GroupNorm(2, 8, activation="silu")),
    "instance norm": lambda: images(nn.InstanceNorm2d(8, track_running_stats=True), nk.InstanceNorm2d(8)),
    "norms without a torch twin": lambda: images(nk.EvoNormB0(8), nk.FilterResponseNorm(8), nk.SwitchableNorm(8)),
    "power norm": lambda: images(nk.PowerNorm(8), nn.Tanh()),
    "policies": lambda: images(
        nk.BatchNorm2d(8, statistics=nk.statistics.Renorm()), nk.BatchNorm2d(8, statistics="ghost:3"), nn.Sigmoid()
    ),
    "frozen": frozen,
    "statistics that wait": waiting,
    "in double": lambda: in_double(images(nn.BatchNorm2d(8), nn.GELU())),
    "spectral norm of old": lambda: images(nn.utils.spectral_norm(nn.Conv2d(8, 8, 1)), nn.BatchNorm2d(8)),
    "parametrized": lambda: images(
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 1)),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1)),
        nn.LeakyReLU(),
    ),
    "shared": lambda: regression(Shared(), torch.randn(9, 4)),
    "words": lambda: (Words(), (torch.randint(0, 11, (7, 5)), torch.randint(0, 3, (7,))), F.cross_entropy),
    "two inputs": lambda: regression(Pair(), torch.randn(6, 4), torch.randn(6, 4)),
    "remembers": lambda: regression(Remembers(), torch.randn(6, 4)),
    "checkpointing": lambda: regression(Recomputing(), torch.randn(6, 4)),
    "a dict": lambda: (
        Keywords(), {"x": torch.randn(6, 4), "labels": torch.randn(6, 4), "idx": torch.arange(6)},
        lambda output, batch: output["loss"],
    ),
    "no norm": lambda: regression(nn.Linear(4, 4), torch.randn(6, 4)),
}  # fmt: skip
