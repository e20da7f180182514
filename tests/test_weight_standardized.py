"""Layers with standardised weights, against the same written as a loop over output units in float64."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normkit as nk

RELU = nk.blocks.activation_gain("relu")
LAYERS = {
    "WSConv1d": (lambda: nk.WSConv1d(6, 8, 3, padding=1), nn.Conv1d, (4, 6, 7)),
    "WSConv2d": (lambda: nk.WSConv2d(6, 8, 3, stride=2, groups=2), nn.Conv2d, (4, 6, 7, 5)),
    "WSConv3d": (lambda: nk.WSConv3d(6, 8, 2, bias=False), nn.Conv3d, (4, 6, 4, 5, 3)),
    "ScaledWSConv1d": (lambda: nk.blocks.ScaledWSConv1d(6, 8, 3, gamma=RELU), nn.Conv1d, (4, 6, 7)),
    "ScaledWSConv2d": (
        lambda: nk.ScaledWSConv2d(6, 8, 3, padding=1, padding_mode="circular", gamma=RELU),
        nn.Conv2d,
        (4, 6, 7, 5),
    ),
    "ScaledWSConv3d": (lambda: nk.blocks.ScaledWSConv3d(6, 8, 2), nn.Conv3d, (4, 6, 4, 5, 3)),
    "ScaledWSLinear": (lambda: nk.blocks.ScaledWSLinear(6, 8, gamma=RELU), nn.Linear, (4, 6)),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def made(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The layer, its weights off-centre and one unit of constant weights, and an input."""
    build, _, shape = LAYERS[name]
    layer = build()
    with torch.no_grad():
        layer.weight.mul_(3).add_(0.7)
        layer.weight[1] = 0.25
        if hasattr(layer, "gain"):
            layer.gain.mul_(torch.linspace(0.5, 2.0, len(layer.gain)))
    return layer, 5 * torch.randn(shape) + 3


def by_hand(layer: nn.Module) -> torch.Tensor:
    """The standardised weight, unit by unit."""
    rows = []
    for unit, kernel in enumerate(layer.weight):
        variance = ((kernel - kernel.mean()) ** 2).sum() / kernel.numel()
        if hasattr(layer, "gain"):
            most = torch.maximum(variance * kernel.numel(), torch.tensor(layer.eps, dtype=kernel.dtype))
            rows.append(layer.gain[unit] * layer.gamma * (kernel - kernel.mean()) / most**0.5)
        else:
            rows.append((kernel - kernel.mean()) / (variance + layer.eps) ** 0.5)
    return torch.stack(rows)


@each_layer
def test_output_and_gradients_are_those_of_the_loop(name):
    layer, x = made(name)
    layer, x = layer.double(), x.double().requires_grad_()
    plain = LAYERS[name][1].forward
    y = layer(x)
    upstream = torch.randn_like(y)
    leaves = [x, *layer.parameters()]
    got = torch.autograd.grad(y, leaves, upstream)
    weight = by_hand(layer)
    if isinstance(layer, nn.Linear):
        wanted = F.linear(x, weight, layer.bias)
    else:
        wanted = layer._conv_forward(x, weight, layer.bias)
    assert plain(layer, x).shape == y.shape
    terms = layer.weight[0].numel() * x.abs().max() * weight.abs().max()
    assert (y - wanted).abs().max() <= 4 * torch.finfo(y.dtype).eps * terms
    for mine, other in zip(got, torch.autograd.grad(wanted, leaves, upstream), strict=True):
        size = upstream.numel() * x.abs().max() * weight.abs().max() / math.sqrt(layer.eps)
        assert (mine - other).abs().max() <= 4 * torch.finfo(y.dtype).eps * size


@each_layer
def test_a_drop_in_takes_the_checkpoint_of_torchs_layer(name):
    build, torchs, _ = LAYERS[name]
    layer = build()
    assert isinstance(layer, torchs)
    own = {key for key in layer.state_dict() if key != "gain"}
    assert own == {"weight", "bias"} or own == {"weight"}
    again = build()
    again.load_state_dict(layer.state_dict())
    x = torch.randn(LAYERS[name][2])
    for other in (again, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other(x).equal(layer(x))


@each_layer
def test_it_compiles_whole_and_exports(name):
    torch._dynamo.reset()
    layer, x = made(name)
    assert torch.compile(layer, fullgraph=True, backend="eager")(x).equal(layer(x))
    program = torch.export.export(layer, (x,))
    assert all(str(n.target).startswith("aten.") for n in program.graph.nodes if n.op == "call_function")
    assert program.module()(x).equal(layer(x))


@each_layer
def test_autocast_and_narrow_weights(name):
    layer, x = made(name)
    wanted = layer(x)
    bound = 0.05 * wanted.abs().max()  # some percent of bfloat16, of numbers as large as the largest
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - wanted).abs().max() <= bound
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())
    narrow = layer.bfloat16()(x.bfloat16())
    assert (narrow.float() - wanted).abs().max() <= bound


@each_layer
def test_the_mean_of_the_weights_and_their_scale_do_not_matter(name):
    layer, x = made(name)
    layer, x = layer.double(), x.double()
    y = layer(x)
    varied = torch.tensor([unit for unit in range(8) if unit != 1])  # that one is constant: there epsilon decides
    with torch.no_grad():
        layer.weight[varied] = layer.weight[varied] * 4 + 1
        layer.eps = layer.eps if hasattr(layer, "gain") else 16 * layer.eps
    moved = (layer(x) - y).index_select(1, varied)
    assert moved.abs().max() <= 1e-12 * y.abs().max()


def test_the_scaled_one_keeps_the_variance_through_fifty_layers_and_the_plain_one_does_not():
    x = torch.randn(64, 256)
    for _ in range(50):
        x = nk.blocks.ScaledWSLinear(256, 256, bias=False, gamma=RELU)(x.relu())
    assert 0.5 < x.var() < 2
    blown_up = nk.WSConv1d(256, 256, 1, bias=False)(torch.randn(8, 256, 16))
    assert blown_up.var() > 100
