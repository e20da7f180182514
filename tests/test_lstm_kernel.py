"""What the gates of an LSTM make of its cell, in the compiled kernel: against the formula, with both derivatives."""

from __future__ import annotations

import pytest
import torch

import normkit as nk
from normkit.blocks.recurrent_steps import lstm
from normkit.kernels import loading
from normkit.kernels import lstm as kernel

pytestmark = pytest.mark.skipif(loading.module is None, reason=str(loading.absence))

SHAPES = [(1, 1), (3, 5), (2, 8), (5, 17), (64, 40), (70, 131)]
"""Samples and units: less than a register, several, with a rest; and enough for a second thread."""


def inputs(n, h, dtype=torch.float64, scale=2.0):
    return [(torch.randn(n, size, dtype=dtype) * scale).requires_grad_() for size in (4 * h, 4 * h, h)]


def by_formula(driven, recurrent, cell):
    i, f, g, o = (driven + recurrent).chunk(4, 1)
    return f.sigmoid() * cell + i.sigmoid() * g.tanh(), o.sigmoid()


def derivatives(step, given):
    """Outputs, and gradients for upstream ones that differ from place to place."""
    outputs = step(*given)
    upstream = [torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, given, upstream)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1e-4, 2.0, 60.0])
@pytest.mark.parametrize(("n", "h"), SHAPES)
def test_it_is_the_formula(n, h, scale, dtype):
    given = inputs(n, h, dtype, scale)
    exact = derivatives(by_formula, [x.detach().double().requires_grad_() for x in given])
    for ours, right in zip(derivatives(kernel.step, given), exact, strict=True):
        least = (1e-14 if dtype == torch.float64 else 3e-7) * max(1.0, scale)
        torch.testing.assert_close(ours.double(), right, rtol=1e-6, atol=min(least, 1e-3 * scale))


@pytest.mark.parametrize("around", [1e-6, 0.01, 0.2, 0.25, 0.3, 1.0, 8.0, 80.0])
def test_the_candidate_keeps_its_digits_near_zero(around):
    """A tanh by way of e^x would keep none: 1 - e^-2x of a small x is the difference of two numbers that are alike."""
    h = 64
    driven = torch.zeros(1, 4 * h)
    driven[:, :h] = 100  # the input gate is open
    driven[:, 2 * h : 3 * h] = around * torch.linspace(-1.1, 1.1, h)
    cell, _ = kernel.step(driven, torch.zeros(1, 4 * h), torch.zeros(1, h))
    torch.testing.assert_close(cell.double(), driven[:, 2 * h : 3 * h].double().tanh(), rtol=5e-7, atol=0)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_goes_where_the_formula_lets_it(wrong):
    given = [x.detach() for x in inputs(2, 9, torch.float32)]
    for x in given:
        x[0, 0] = wrong
    for ours, right in zip(kernel.step(*given), by_formula(*given), strict=True):
        assert ours.isnan().equal(right.isnan())
        torch.testing.assert_close(ours, right, equal_nan=True)


def test_a_part_without_a_gradient_counts_as_none():
    given = inputs(3, 5)
    for asked in (0, 1):
        ours = torch.autograd.grad(kernel.step(*given)[asked].sum(), given)
        right = torch.autograd.grad(by_formula(*given)[asked].sum(), given, materialize_grads=True)
        torch.testing.assert_close(ours, right)


def test_its_gradients_can_be_differentiated():
    given = inputs(2, 3)
    assert torch.autograd.gradcheck(kernel.step, given)
    assert torch.autograd.gradgradcheck(kernel.step, given)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("reason", ["narrow", "mixed", "strided", "subclass", "transform", "tracer"])
def test_what_it_cannot_run_is_left_to_torch(reason):
    driven, recurrent, cell = (x.detach() for x in inputs(3, 5, torch.float32))
    match reason:
        case "narrow":
            assert kernel.step(driven.bfloat16(), recurrent.bfloat16(), cell.bfloat16()) is None
        case "mixed":
            assert kernel.step(driven, recurrent.bfloat16(), cell) is None
        case "strided":
            assert kernel.step(driven, recurrent.T.contiguous().T, cell) is None
        case "subclass":
            assert kernel.step(driven, recurrent, torch.nn.Parameter(cell).as_subclass(_Own)) is None
        case "transform":
            torch.func.vmap(lambda x: _none(kernel.step(x, recurrent, cell), x))(driven[None])
        case "tracer":
            torch.jit.trace(lambda x: _none(kernel.step(x, recurrent, cell), x), driven, check_trace=False)


class _Own(torch.Tensor):
    pass


def _none(found, x):
    assert found is None
    return x * 2


def test_a_layer_runs_it_unless_another_backend_is_asked_for(monkeypatch):
    ran, real = [], kernel.step
    monkeypatch.setattr(kernel, "step", lambda *given: ran.append(1) or real(*given))
    layer, x = nk.LSTM(3, 6, norm="layer"), torch.randn(4, 2, 3)
    fused = layer(x)[0]
    assert len(ran) == 4
    with nk.backend("torch"):
        torch.testing.assert_close(layer(x)[0], fused)
    assert len(ran) == 4


def test_one_step_is_that_of_the_layer():
    driven, recurrent, cell = inputs(3, 5)
    hidden, new = lstm(driven, recurrent, (cell, cell), lambda c: c * 2)
    right, output = by_formula(driven, recurrent, cell)
    torch.testing.assert_close(new, right)
    torch.testing.assert_close(hidden, output * (right * 2).tanh())
