"""Residual blocks without normalization: what the formulas say, and what a signal does that goes through many."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import normkit as nk
from normkit.blocks import FixupResidual, LayerScale, NormalizerFreeResidual, ReZero, ScaledWSLinear, SkipInit, fixup_

PUBLISHED = {"relu": 1.71396, "silu": 1.78813, "gelu": 1.70150, nn.Tanh: 1.59391, nn.Sigmoid: 4.80384, None: 1.0}


@pytest.mark.parametrize("activation", PUBLISHED, ids=str)
def test_the_gains_are_the_published_ones(activation):
    """Which come from random samples, and are off by some parts in ten thousand (relu: the closed form below)."""
    assert nk.blocks.activation_gain(activation) == pytest.approx(PUBLISHED[activation], rel=1e-3)


def test_the_gain_of_relu_in_closed_form_and_of_what_has_none():
    assert nk.blocks.activation_gain(torch.relu) == pytest.approx(math.sqrt(2 / (1 - 1 / math.pi)), rel=1e-7)
    with pytest.raises(ValueError, match="does not vary"):
        nk.blocks.activation_gain(torch.zeros_like)


def relu_branch(width: int) -> nn.Module:
    gamma = nk.blocks.activation_gain("relu")
    return nn.Sequential(nn.ReLU(), ScaledWSLinear(width, width, bias=False, gamma=gamma))


def test_the_expected_deviations_are_those_that_are_seen():
    x, width = torch.randn(512, 256), 256
    for place, beta in enumerate(nk.blocks.expected_deviations([False] * 40)):
        assert beta == pytest.approx(math.sqrt(1 + 0.04 * place))
        assert x.std().item() == pytest.approx(beta, rel=0.15)
        x = NormalizerFreeResidual(relu_branch(width), beta=beta, gain_init=1.0)(x)


def test_the_formulas_of_the_blocks():
    x, layer, short = torch.randn(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)
    assert NormalizerFreeResidual(layer)(x).equal(x)
    block = NormalizerFreeResidual(layer, alpha=0.5, beta=2.0, shortcut=short, gain_init=3.0)
    assert torch.allclose(block(x), short(x / 2) + 1.5 * layer(x / 2))
    assert torch.allclose(SkipInit(layer, short, init=0.25)(x), short(x) + 0.25 * layer(x))
    assert ReZero(layer)(x).equal(x)
    images = torch.randn(2, 6, 3, 3)
    assert LayerScale(6, 0.1)(x).allclose(0.1 * x)
    assert LayerScale(6, 0.1, channels_first=True)(images).allclose(0.1 * images)
    block = FixupResidual([layer, short], nn.Tanh())
    with torch.no_grad():
        block.biases.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
        block.scale.fill_(2.0)
    wanted = x + 2 * short(torch.tanh(layer(x + 0.1) + 0.2) + 0.3) + 0.4
    assert torch.allclose(block(x), wanted, atol=1e-6)


@pytest.mark.parametrize(
    "block", [NormalizerFreeResidual, SkipInit, lambda layer: FixupResidual([layer, nn.Linear(6, 6)])]
)
def test_they_compile_whole_and_export(block):
    torch._dynamo.reset()
    made, x = block(nn.Linear(6, 6)), torch.randn(4, 6)
    assert torch.compile(made, fullgraph=True, backend="eager")(x).equal(made(x))
    assert torch.export.export(made, (x,)).module()(x).equal(made(x))


def test_fixup_gives_the_initial_weights_of_the_paper():
    blocks = [FixupResidual([nn.Linear(64, 256), nn.Linear(256, 256), nn.Linear(256, 64)]) for _ in range(16)]
    model = nn.Sequential(*blocks, nn.Linear(64, 10))
    fixup_(model, head=model[-1], generator=torch.Generator().manual_seed(0))
    for block in blocks:
        for layer in block.layers[:2]:
            wanted = math.sqrt(2 / layer.in_features) * 16 ** (-1 / 4)
            assert layer.weight.std().item() == pytest.approx(wanted, rel=0.05)
        assert not block.layers[2].weight.any()
        assert not any(layer.bias.any() for layer in block.layers)
    x = torch.randn(4, 64)
    assert model[:-1](x).equal(x)
    assert not model(x).any()


def test_what_fixup_refuses():
    with pytest.raises(ValueError, match=r"1 layers; .* at least 2"):
        FixupResidual([nn.Linear(4, 4)])
    with pytest.raises(ValueError, match="Sequential has no FixupResidual"):
        fixup_(nn.Sequential(nn.Linear(4, 4)))


def first_gradients(depth: int, block) -> float:
    """The gradient of the first block's input beside that of the last one's output, at the start."""
    x = torch.randn(64, 64, requires_grad=True)
    y = nn.Sequential(*(block(place) for place in range(depth)))(x)
    upstream = torch.randn_like(y)
    return (torch.autograd.grad(y, x, upstream)[0].norm() / upstream.norm()).item()


def test_two_hundred_blocks_pass_a_gradient_on_and_without_any_of_it_they_do_not():
    """Plain He layers with skips double the signal every block: 2 ** 100 in two hundred (sqrt(2) for each)."""
    betas = list(nk.blocks.expected_deviations([False] * 200))

    def plain(place):
        layer = nn.Linear(64, 64, bias=False)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        return SkipInit(nn.Sequential(nn.ReLU(), layer), init=1.0)

    free = lambda place: NormalizerFreeResidual(relu_branch(64), beta=betas[place], gain_init=1.0)
    assert 0.1 < first_gradients(200, free) < 10
    assert first_gradients(200, plain) > 1e6
