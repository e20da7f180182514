"""float64, float32, bfloat16, float16: what a cast does to a layer, and what a layer does with each."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import normkit as nk
from cases import CASES, FORMS
from twins import TRACKING, TWINS, VARIANTS, Twin, assert_same, off_scale, step

ORDINARY = CASES[0]
NARROW = (torch.bfloat16, torch.float16)
ALL = (torch.float64, torch.float32, *NARROW)
CHOICES = ("auto", "torch")
each_form = pytest.mark.parametrize("form", FORMS, ids=str)
each_tracking = pytest.mark.parametrize("twin", TRACKING, ids=str)

CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half()": lambda layer: layer.half(),
    "bfloat16()": lambda layer: layer.bfloat16(),
    "to(dtype)": lambda layer: layer.to(torch.bfloat16),
    "to(device, dtype)": lambda layer: layer.to("cpu", torch.float16),
    "to(tensor)": lambda layer: layer.to(torch.zeros(1, dtype=torch.bfloat16)),
    "type(dtype)": lambda layer: layer.type(torch.float16),
    "inside a model": lambda layer: nn.Sequential(nn.ReLU(), nn.Sequential(layer)).bfloat16()[1][0],
    "there and back": lambda layer: layer.half().bfloat16().half(),
}


def awkward(layer: nn.Module) -> dict[str, Tensor]:
    """Statistics that no narrow type can hold, put into the layer."""
    values = {"running_mean": torch.linspace(-1.0, 1.0, 6) / 3, "running_var": torch.linspace(1.0, 2.0, 6) * 1e-9 / 3}
    for name, value in values.items():
        getattr(layer, name).copy_(value)
    return values


@pytest.mark.parametrize("cast", CASTS)
@each_tracking
def test_a_cast_leaves_running_statistics_in_float32_and_does_not_round_them(twin, cast):
    layer = twin.layer()
    values = awkward(layer)
    layer = CASTS[cast](layer)
    assert all(parameter.dtype in NARROW for parameter in layer.parameters())
    assert_same({name: getattr(layer, name) for name in values}, values)
    layer.float()
    assert_same({name: getattr(layer, name) for name in values}, values)


@each_tracking
def test_a_wider_type_is_taken_and_given_back(twin):
    layer = twin.layer()
    values = awkward(layer)
    layer.double()
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float64
    layer.half()
    assert_same({name: getattr(layer, name) for name in values}, values)
    assert twin.layer(dtype=torch.float64).running_mean.dtype == torch.float64


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@each_tracking
def test_the_constructor_and_checkpoints_leave_them_in_float32(twin, dtype):
    layer = twin.layer(dtype=dtype)
    checkpoint = twin.torchs(*twin.required(), dtype=dtype, **twin.options).state_dict()
    checkpoint["running_mean"] += 0.1
    for assign in (None, False, True):
        if assign is not None:
            layer.load_state_dict(checkpoint, assign=assign)
            assert layer.running_mean.equal(checkpoint["running_mean"].float())
        assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
        assert all(parameter.dtype == dtype for parameter in layer.parameters())
    meta = twin.layer(device="meta", dtype=dtype).to_empty(device="cpu")
    assert meta.running_var.dtype == torch.float32


@pytest.mark.parametrize("cast", CASTS)
@each_tracking
def test_the_opt_out_is_torch(twin, cast):
    ours, torchs = twin.layer(low_precision_buffers=True), twin.torchs(*twin.required(), **twin.options)
    assert "low_precision_buffers=True" in repr(ours)
    awkward(ours), awkward(torchs)
    ours, torchs = CASTS[cast](ours), CASTS[cast](torchs)
    assert_same(ours.state_dict(), torchs.state_dict())
    dtype = ours.running_mean.dtype
    with nk.backend("torch"):
        for training in (True, False):
            ours.train(training), torchs.train(training)
            x, upstream = twin.input(dtype=dtype), torch.randn(twin.shape()).to(dtype)
            assert_same(step(ours, x, upstream), step(torchs, x, upstream))


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("dtype", ALL, ids=str)
@each_form
def test_output_and_gradients_have_the_types_of_what_they_belong_to(form, dtype, choice):
    layer = form.layer(ORDINARY, dtype, activation="relu")
    for training in (True, False):
        layer.train(training).zero_grad()
        x = ORDINARY.input(form, dtype).requires_grad_()
        with nk.backend(choice):
            y = layer(x, residual=x.detach() / 2)
            y.backward(torch.randn_like(y))
        assert y.dtype == x.grad.dtype == dtype
        assert all(p.dtype == p.grad.dtype == dtype for p in layer.parameters())
        assert all(tensor.isfinite().all() for tensor in (y, x.grad, *(p.grad for p in layer.parameters())))


def kind(call: Callable[[], Tensor]) -> object:
    """The type of the result, or of the exception."""
    try:
        return call().dtype
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(
    "twin", [t for t in VARIANTS if t.dim == 2 and getattr(t.layer(), "bias", None) is not None], ids=str
)
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_mixed_types_give_what_torch_gives_or_work_where_torch_refuses(twin, choice):
    """A deviation where statistics are kept: they are float32, so that narrow weights go with any float input."""
    more = set()
    for of_input, of_layer in itertools.product(ALL, ALL):
        for training in (True, False):
            ours, torchs = (layer.to(of_layer).train(training) for layer in twin.pair())
            x = twin.input(dtype=of_input)
            with nk.backend(choice):
                got, wanted = kind(lambda: ours(x)), kind(lambda: torchs(x))  # noqa: B023
            if got != wanted:
                assert wanted is RuntimeError
                assert got == of_input
                more.add((of_input, of_layer))
    expected = {(torch.float32, narrow) for narrow in NARROW} if twin.tracks else set()
    expected |= {(a, b) for a, b in itertools.permutations(NARROW, 2)} if twin.tracks else set()
    assert more == expected


def rounding(y: Tensor) -> Tensor:
    """One rounding of the output, and float32 arithmetic on values that are 60 times their deviation."""
    return torch.finfo(y.dtype).eps * y.double().abs() + 4 * 60 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("whose", ["normkit", "torch"])
def test_statistics_of_a_narrow_batch_are_not_rounded_to_it(whose, dtype):
    """torch rounds mean and deviation of a narrow layer to the narrow type on the CPU; red when torch mends it."""
    x = (2 * torch.randn(16, 6, 5, 5) + 100).to(dtype)
    truth = nn.BatchNorm2d(6, dtype=torch.float64)(x.double())
    with nk.backend("torch"):
        y = (nk if whose == "normkit" else nn).BatchNorm2d(6, dtype=dtype)(x)
    right = ((y.double() - truth).abs() <= rounding(y)).all().item()
    assert right == (whose == "normkit")


@pytest.mark.parametrize("twin", [*TWINS], ids=str)
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # torch's own rms_norm
def test_autocast_is_torchs_bit_for_bit(twin: Twin):
    """A float32 layer behind a matrix product in bfloat16."""
    ours, torchs = twin.pair()
    product = nn.Linear(twin.shape()[-1], twin.shape()[-1])
    x, seen = twin.input(), []
    upstream = torch.randn(twin.shape())
    for layer in (ours, torchs):
        with torch.autocast("cpu", torch.bfloat16), nk.backend("torch"):
            y = layer(product(x))
        parameters = [*product.parameters(), *layer.parameters()]
        found = torch.autograd.grad(y, parameters, upstream.to(y.dtype))
        seen.append([y, *found, *layer.state_dict().values()])
    assert all(mine.equal(other) and mine.dtype == other.dtype for mine, other in zip(*seen, strict=True))


def test_the_default_dtype_is_followed():
    torch.set_default_dtype(torch.bfloat16)
    layer = nk.BatchNorm1d(6)
    torch.set_default_dtype(torch.float32)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.running_mean.dtype == torch.float32
    assert layer(off_scale((5, 6), 1, dtype=torch.bfloat16)).dtype == torch.bfloat16
