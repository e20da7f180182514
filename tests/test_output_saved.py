"""Batch norm that keeps its output instead of its input: the same numbers, fewer bytes, and refusals that say why."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import normkit as nk
from normkit.bench.memory import OUTPUT, VARIANTS, chain, gradients, saved_bytes

BACKENDS = ["native", "torch"] if nk.kernels.loading.module is not None else ["torch"]
LAYERS = {
    "1d": (nk.BatchNorm1d, (60, 6)),
    "1d, length": (nk.BatchNorm1d, (7, 6, 9)),
    "2d": (nk.BatchNorm2d, (5, 6, 7, 4)),
    "3d": (nk.BatchNorm3d, (4, 6, 3, 5, 2)),
}
ACTIVATIONS = [None, "leaky_relu", nn.LeakyReLU(0.3)]


def layer_and_input(kind: str, dtype: torch.dtype, last: bool = False, **options) -> tuple[nn.Module, Tensor]:
    """Off-centre and off-scale, with weights of both signs away from zero."""
    make, shape = LAYERS[kind]
    layer = make(6, **options)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.4, -0.7, 1.0, 1.5, -2.0, 0.9]))
        layer.bias.copy_(torch.tensor([0.3, -0.2, 0.0, 1.0, 0.5, -0.6]))
    x = 3 * torch.randn(shape, dtype=torch.float64) + torch.linspace(-2, 5, 6).reshape([1, 6] + [1] * (len(shape) - 2))
    if last:
        x = x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    return (layer.double() if dtype == torch.float64 else layer), x.to(dtype)


def step(layer: nn.Module, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    leaves = {"input": x, **dict(layer.named_parameters())}
    found = torch.autograd.grad(y, list(leaves.values()), upstream)
    return {"output": y.detach(), **dict(zip(leaves, found, strict=True)), **dict(layer.named_buffers())}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize("kind", LAYERS)
def test_it_gives_what_the_layer_that_keeps_its_input_gives(kind, last, activation, backend):
    """Within the rounding of the output: u (|xhat| + |bias / weight|) enters each of the three terms of a gradient."""
    if last and "1d" in kind:
        pytest.skip("a layout of images and volumes")
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        kept, x = layer_and_input(kind, dtype, last, activation=activation, backend=backend)
        ours = copy.deepcopy(kept)
        ours.save = "output"
        upstream = torch.randn_like(x)
        got, wanted = step(ours, x, upstream), step(kept, x, upstream)
        assert got.keys() == wanted.keys()
        for name in ("output", "running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(got[name], wanted[name])
        rounding = 32 * torch.finfo(dtype).eps
        for name in ("input", "weight", "bias"):
            assert got[name].dtype == wanted[name].dtype
            error = (got[name].double() - wanted[name].double()).abs().max()
            assert error <= rounding * wanted[name].double().abs().max(), (dtype, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_gradients(affine, activation, backend):
    layer = nk.BatchNorm2d(6, affine=affine, activation=activation, backend=backend, save="output").double()
    x = layer_and_input("2d", torch.float64)[1].requires_grad_()
    if affine:
        layer.load_state_dict(layer_and_input("2d", torch.float64)[0].state_dict())
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))


def test_it_keeps_the_output_and_little_else():
    layer, x = layer_and_input("2d", torch.float32, activation="leaky_relu", save="output")
    x.requires_grad_()
    seen: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        y = layer(x)
    large = [t for t in seen if t.numel() >= x.numel()]
    assert [t.data_ptr() for t in large] == [y.data_ptr()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_chain_keeps_at_least_35_percent_less(dtype):
    """Against torch's layers, in place and not, and against normkit's own layer that keeps its input."""
    x = torch.randn(4, 16, 12, 12).to(dtype).requires_grad_()
    kept = {}
    for variant in VARIANTS:
        model = chain(variant, channels=16, blocks=6).to(dtype)
        kept[variant] = saved_bytes(model, x, model.parameters())
    one = x.numel() * x.element_size()
    assert 6 * one <= kept[OUTPUT] < 6.1 * one  # one tensor per block; the rest is per channel
    assert all(kept[OUTPUT] <= 0.65 * other for name, other in kept.items() if name != OUTPUT)


def test_the_gradients_of_a_chain_are_as_good_as_torchs():
    x, upstream = torch.randn(4, 16, 12, 12), torch.randn(4, 16, 12, 12)
    right = gradients(chain("torch", 16, 6).double(), x.double(), upstream.double())
    errors = {}
    for variant in ("torch", OUTPUT):
        got = gradients(chain(variant, 16, 6), x, upstream)
        errors[variant] = {name: (got[name] - right[name]).norm() / right[name].norm() for name in right}
    assert all(errors[OUTPUT][name] <= 4 * errors["torch"][name] + 1e-6 for name in right)


@pytest.mark.parametrize("activation", ["relu", "silu", nn.Tanh(), nn.LeakyReLU(0.0), nn.LeakyReLU(-0.1)], ids=str)
def test_an_activation_that_cannot_be_undone_is_refused(activation):
    with pytest.raises(ValueError, match="cannot be undone"):
        nk.BatchNorm2d(3, activation=activation, save="output")
    layer = nk.BatchNorm2d(3, save="output")
    layer.activation = activation if isinstance(activation, nn.Module) else nk.epilogue.activation_module(activation)
    with pytest.raises(ValueError, match="cannot be undone"):
        layer(torch.randn(4, 3, 5, 5, requires_grad=True))


def test_a_residual_is_refused():
    layer, x = layer_and_input("2d", torch.float32, save="output")
    with pytest.raises(ValueError, match="out of a sum nobody finds x again"):
        layer(x, residual=x)
    with torch.no_grad():
        assert layer(x, residual=x).shape == x.shape


@pytest.mark.parametrize(
    ("weight", "bias", "dtype", "refused"),
    [
        (0.0, 0.0, torch.float32, True),
        (9e-4, 0.0, torch.float32, True),
        (-1.1e-3, 0.0, torch.float32, False),
        (0.1, 1.0, torch.float32, False),
        (0.1, 1.0, torch.bfloat16, True),  # the output has 8 digits: 1 / 256 of the bias is 4 % of a deviation
        (-0.2, 1.0, torch.bfloat16, False),
        (0.01, 1.0, torch.float16, True),
        (0.02, -1.0, torch.float16, False),
    ],
)
def test_a_weight_near_zero_is_refused(weight, bias, dtype, refused):
    layer = nk.BatchNorm1d(3, save="output")
    with torch.no_grad():
        layer.weight[1], layer.bias[1] = weight, bias
    x = torch.randn(50, 3).to(dtype)
    if not refused:
        layer(x)
        return
    with pytest.raises(ValueError, match=r"1 of 3 are too near 0.\n  channel 1: "):
        layer(x)
    with torch.no_grad():
        layer(x)
    layer.eval()(x)


def test_what_it_promises_not_to_do_raises():
    layer, x = layer_and_input("2d", torch.float64, activation="leaky_relu", save="output")
    x.requires_grad_()
    y = layer(x)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    y = layer(x)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_under_a_transform_or_a_compiler_it_is_the_ordinary_layer():
    kept, x = layer_and_input("2d", torch.float32, activation="leaky_relu", track_running_stats=False)
    ours = copy.deepcopy(kept)
    ours.save = "output"
    wanted = torch.func.grad(lambda x: kept(x).square().sum())(x)
    torch.testing.assert_close(torch.func.grad(lambda x: ours(x).square().sum())(x), wanted)
    whole = torch.compile(ours, backend="aot_eager", fullgraph=True)
    got = step(whole, x, torch.ones_like(x))
    torch.testing.assert_close(
        {name.removeprefix("_orig_mod."): value for name, value in got.items()}, step(kept, x, torch.ones_like(x))
    )


def test_evaluation_and_frozen_layers_are_the_ordinary_layer():
    layer, x = layer_and_input("2d", torch.float32, activation="leaky_relu")
    ours = copy.deepcopy(layer)
    ours.save = "output"
    upstream = torch.randn_like(x)
    got, wanted = step(ours.eval(), x, upstream), step(layer.eval(), x, upstream)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_the_option_shows_and_is_copied():
    layer = nk.BatchNorm3d(3, save="output")
    assert "save='output'" in repr(copy.deepcopy(layer))
    assert "save" not in repr(nk.BatchNorm3d(3))
    assert nk.LazyBatchNorm2d(save="output").save == "output"
    with pytest.raises(ValueError, match='neither "input" nor "output"'):
        nk.BatchNorm2d(3, save="both")


def test_no_kernel_is_needed():
    explained = nk.explain(nk.BatchNorm2d(3, save="output", backend="torch"), torch.randn(4, 3, 5, 5))
    assert explained.backend == "torch"
