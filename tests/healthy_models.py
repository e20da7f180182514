"""Architectures with nothing wrong, trained for a moment: the doctor has to leave them in peace.

The quick ones learn scikit-learn's digits here; ``hosted`` are tiny configurations of Hugging Face transformers with
random weights and calibrated statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import normkit as nk

BATCH = 64


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images (n, 1, 8, 8) of mean 0 and deviation 1, and their labels, in a fixed order that is no order."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(7))
    return ((images - images.mean()) / images.std())[order], torch.tensor(found.target)[order]


def batches(count: int, size: int = BATCH, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Random batches of digits."""
    x, y = digits()
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(len(x), (size,), generator=generator) for _ in range(count)]
    return [(x[rows], y[rows]) for rows in drawn]


@dataclass(frozen=True)
class Patient:
    """What nk.diagnose is given."""

    model: nn.Module
    batch: Any
    loss_fn: Callable[..., Tensor]
    optimizer: torch.optim.Optimizer


def trained(model: nn.Module, steps: int = 60, lr: float = 3e-3) -> Patient:
    """AdamW on digits, decay as it is recommended."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(nk.param_groups(model, weight_decay=0.01), lr=lr)
    model.train()
    for x, y in batches(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return Patient(model, batches(1, seed=1)[0], F.cross_entropy, optimizer)


class Flat(nn.Sequential):
    """Vectors."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(nn.Flatten(), *layers)


class Rows(nn.Module):
    """Sequences of 8 rows with 8 pixels: (n, length, features)."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Linear(8, width), inner, nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(self.embed(x.squeeze(1)))
        return self.head((y[0] if isinstance(y, tuple) else y).mean(1))


class Residual(nn.Module):
    """Two convolutions, each with its norm, and a skip."""

    def __init__(self, width: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x))))))


def mlp(norm: str | None, activation: Callable[[], nn.Module] = nn.ReLU, width: int = 64) -> nn.Module:
    layers: list[nn.Module] = []
    for inner in (64, width, width):
        middle = [] if norm is None else [nk.create(norm, width, dim=1)]
        layers += [nn.Linear(inner, width, bias=norm is None), *middle, activation()]
    return Flat(*layers, nn.Linear(width, 10))


def residual(norm: Callable[[int], nn.Module], blocks: int = 2, width: int = 16) -> nn.Module:
    stem = [nn.Conv2d(1, width, 3, padding=1, bias=False), norm(width), nn.ReLU()]
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    return nn.Sequential(*stem, *(Residual(width, norm) for _ in range(blocks)), *tail)


def encoder(first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True, norm_first=first)
    return Rows(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), 32)


class Whole(nn.Module):
    """torch.nn.Transformer: rows in, rows out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 32), nn.Linear(32, 10)
        self.transformer = nn.Transformer(32, 4, 1, 1, 64, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.embed(x.squeeze(1))
        return self.head(self.transformer(rows, rows).mean(1))


class Mixer(nn.Module):
    """MLP-Mixer over rows, with any norm of features."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(32), norm(32)
        self.tokens = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.channels = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class UNet(nn.Module):
    """One level down and up, batch norm at both."""

    def __init__(self) -> None:
        super().__init__()
        block = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        self.down, self.bottom, self.up = block(1, 8), block(8, 16), block(24, 8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        low = self.bottom(F.max_pool2d(skip, 2))
        joined = torch.cat([skip, F.interpolate(low, scale_factor=2)], 1)
        return self.head(self.up(joined).mean((2, 3)))


class SqueezeExcite(nn.Module):
    """A gate per channel, out of the mean of each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Conv2d(width, 4, 1), nn.SiLU(), nn.Conv2d(4, width, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean((2, 3), keepdim=True))


def mobile() -> nn.Module:
    act = lambda width: [nn.BatchNorm2d(width), nn.SiLU()]
    layers = [nn.Conv2d(1, 16, 3, padding=1, bias=False), *act(16)]
    layers += [nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), *act(16), SqueezeExcite(16)]
    layers += [nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(24, 10))


def convolutions_over_rows() -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten(1, 2)]
    for inner, width in ((8, 24), (24, 24)):
        layers += [nn.Conv1d(inner, width, 3, padding=1, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(24, 10))


def frozen_backbone() -> nn.Module:
    backbone = residual(nn.BatchNorm2d)
    trained(backbone)
    nk.freeze_(backbone)
    backbone[-1] = nn.Linear(16, 10)
    return backbone


def normalizer_free() -> nn.Module:
    def block() -> nn.Module:
        layers = [nk.ScaledWSConv2d(16, 16, 3, padding=1), nn.ReLU(), nk.ScaledWSConv2d(16, 16, 3, padding=1)]
        return nk.blocks.NormalizerFreeResidual(nn.Sequential(nn.ReLU(), *layers))

    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
    return nn.Sequential(nk.ScaledWSConv2d(1, 16, 3, padding=1), block(), block(), *tail)


def siamese() -> nn.Module:
    class Halves(nn.Module):
        """One network on the left and on the right half of each image."""

        def __init__(self) -> None:
            super().__init__()
            self.side = nn.Sequential(nn.Flatten(), nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU())
            self.head = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.side(x[..., :4]), self.side(x[..., 4:].flip(-1))], 1))

    return Halves()


OWN: dict[str, Callable[[], nn.Module]] = {
    "mlp, batch norm": lambda: mlp("batch"),
    "mlp, batch norm, sigmoid": lambda: mlp("batch", nn.Sigmoid),
    "mlp, batch norm, tanh": lambda: mlp("batch", nn.Tanh),
    "mlp, layer norm": lambda: mlp("layer"),
    "mlp, RMS norm": lambda: mlp("rms"),
    "mlp, DyT": lambda: mlp("dyt"),
    "mlp without norms": lambda: mlp(None),
    "mlp without norms, SELU": lambda: mlp(None, nn.SELU),
    "residual, batch norm": lambda: residual(nn.BatchNorm2d),
    "residual, batch norm, 8 blocks": lambda: residual(nn.BatchNorm2d, blocks=8),
    "residual, group norm": lambda: residual(lambda width: nn.GroupNorm(4, width)),
    "residual, instance norm": lambda: residual(lambda width: nn.InstanceNorm2d(width, affine=True)),
    "residual, filter response norm": lambda: residual(lambda width: nk.create("filter_response_norm", width)),
    "residual, ghost batch norm": lambda: residual(lambda width: nk.BatchNorm2d(width, statistics="ghost:32")),
    "residual, group norm, standardised weights": lambda: standardised(),
    "residual, normalizer-free": normalizer_free,
    "frozen backbone, new head": frozen_backbone,
    "U-Net, batch norm": UNet,
    "depthwise, squeeze and excite": mobile,
    "convolutions over a sequence": convolutions_over_rows,
    "LSTM": lambda: Rows(nn.LSTM(24, 24, batch_first=True), 24),
    "Transformer encoder, norm first": lambda: encoder(True),
    "Transformer encoder, norm last": lambda: encoder(False),
    "torch.nn.Transformer": Whole,
    "Mixer, layer norm": lambda: Rows(Mixer(nn.LayerNorm), 32),
    "Mixer, RMS norm": lambda: Rows(Mixer(nn.RMSNorm), 32),
    "one network on two halves": siamese,
}


def standardised() -> nn.Module:
    model = residual(lambda width: nn.GroupNorm(4, width))
    model[0] = nk.WSConv2d(1, 16, 3, padding=1)
    return model


LAB = (
    ("digits", "none", {}),
    ("digits", "batch", {}),
    ("digits-relu", "layer", {}),
    ("digits-relu", "batch", {}),
    ("digits-cnn", "batch", {}),
    ("digits-cnn", "group:4", {}),
    ("digits-cnn", "none", {}),
    ("digits-sequence", "layer", {}),
    ("text", "layer", {}),
    ("text", "rms", {}),
    ("tabular", "batch", {}),
)
"""Tasks of `normkit compare` and arms of theirs."""


def lab_task(name: str, norm: str, options: dict[str, Any]) -> Patient:
    """The network of a task of `normkit compare`, trained for a moment on its own data."""
    from normkit.lab.arm import Arm
    from normkit.lab.build import build_model
    from normkit.lab.load import Source
    from normkit.lab.worker import seeded_data

    task = Source(name).load(options)
    model, _ = build_model(task, Arm(norm), seed=0)
    data = seeded_data(task, 0).train
    optimizer = torch.optim.AdamW(nk.param_groups(model), lr=3e-3)
    for step in range(60):
        x, y = data.take((torch.arange(task.batch_size) + step * task.batch_size) % len(data))
        optimizer.zero_grad()
        task.loss(model(x), y).backward()
        optimizer.step()
    return Patient(model, data.first(task.batch_size), task.loss, optimizer)


MOMENTUM = {"mobilenet_v2": 0.003, "efficientnet": 0.01}
"""As their papers have it. The configurations of transformers say 0.997 and 0.99 and hand that to torch, which counts
the other way round: the rule momentum_reversed is right about them (test_rules.py).
"""


def more_hosted() -> dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]]:
    """Beside those of hosted_models: norms last, norms first, and norms on queries and keys."""
    import hosted_models as hosted

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    made = lambda kind, of, **options: getattr(hosted.transformers, kind)._from_config(hosted.config(of, **options))
    bert = lambda: made("BertForMaskedLM", of="Bert", vocab_size=96, **sizes)
    gpt2 = lambda: made("GPT2LMHeadModel", of="GPT2", vocab_size=96, n_embd=24, n_layer=2, n_head=4, n_positions=32)
    qwen = lambda: made(
        "Qwen3ForCausalLM", of="Qwen3", vocab_size=96, num_key_value_heads=2, head_dim=8, use_cache=False, **sizes
    )
    return {"bert": (bert, hosted.words), "gpt2": (gpt2, hosted.words), "qwen3": (qwen, hosted.words)}


def hosted(name: str) -> Patient:
    """A tiny configuration of Hugging Face transformers: weights drawn as He et al. do, statistics of a few batches."""
    import hosted_models

    torch.manual_seed(0)
    build, inputs = (hosted_models.MODELS | more_hosted())[name]
    model = build().train()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # EfficientNet of transformers draws it around 0, with deviation 0.02
            module.momentum = MOMENTUM.get(name, module.momentum)
    many = lambda: {key: torch.cat([inputs()[key] for _ in range(8)]) for key in inputs()}
    nk.calibrate_(model, [many() for _ in range(3)])
    optimizer = torch.optim.AdamW(nk.param_groups(model), lr=1e-3)
    return Patient(model, many(), lambda output, batch: output[0].float().square().mean(), optimizer)
