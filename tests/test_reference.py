"""The oracle itself: against paper, torch and finite differences; and that it borrows no norm from torch."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import normkit as nk
from by_hand import EXAMPLES
from cases import CASES, DTYPES, FORMS, ORDINARY, meetings
from normkit.vocabulary.spec import REGISTRY
from oracle import Truth, assert_matches, running_statistics

# Float64 sums of a few integers: some ten roundings of numbers below 20.
PAPER = 10 * 20 * torch.finfo(torch.float64).eps
NARROW_ROWS = next(case for case in CASES if case.name == "narrow")
OFFSET = next(case for case in CASES if case.name == "offset")


def numbers(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_the_reference_agrees_with_paper(example):
    layer = example.layer().double()
    with torch.no_grad():
        for name, values in example.parameters.items():
            getattr(layer, name).copy_(numbers(values))
    x = numbers(example.x).requires_grad_()
    residual = None if example.residual is None else numbers(example.residual).requires_grad_()
    with nk.backend("reference"):
        y = layer(x, residual=residual)
    y.backward(numbers(example.upstream))
    found = {"y": y.detach(), "of_x": x.grad} | {name: getattr(layer, name) for name in example.running}
    wanted = {"y": example.y, "of_x": example.of_x} | example.running
    for name, values in example.gradients.items():
        found[f"gradient of {name}"] = residual.grad if name == "residual" else getattr(layer, name).grad
        wanted[f"gradient of {name}"] = values
    for name, values in wanted.items():
        assert found[name].shape == numbers(values).shape, name
        assert (found[name] - numbers(values)).abs().max() <= PAPER, name


def test_every_norm_has_an_example_on_paper():
    assert {type(example.layer()).spec.name for example in EXAMPLES} == set(REGISTRY)


def in_torch(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, list]:
    """The layer in torch.nn.functional, and its running statistics afterwards: each norm once more, for this test."""
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if layer.spec.name == "identity":
        return x, []
    if layer.spec.name == "group_norm":
        return F.group_norm(x, layer.num_groups, weight, bias, layer.eps), []
    if layer.spec.name in ("layer_norm", "rms_norm"):
        rows = x.movedim(1, -1) if layer.channels_first else x
        if layer.spec.name == "layer_norm":
            y = F.layer_norm(rows, layer.normalized_shape, weight, bias, layer.eps)
        else:
            y = F.rms_norm(rows, layer.normalized_shape, weight, layer.eps)
        return (y.movedim(-1, 1) if layer.channels_first else y), []
    running = [buffer if buffer is None else buffer.clone() for buffer in (layer.running_mean, layer.running_var)]
    by_batch = layer.training or running[0] is None
    function = {"batch_norm": F.batch_norm, "instance_norm": F.instance_norm}[layer.spec.name]
    y = function(x, *running, weight, bias, by_batch, layer.momentum, layer.eps)
    return y, [] if running[0] is None else running


TWINNED = [form for form in FORMS if form.spec.twin is not None]
"""The others are no norm of torch; there parity holds the reference against a second way to write the norm."""
FULL = [case for case in CASES if case.samples and "last" not in case.name]


@pytest.mark.parametrize(("form", "case"), meetings(FULL, TWINNED))
def test_the_reference_agrees_with_torch(form, case):
    """In float64, output, gradients and running statistics, first in training and then in evaluation.

    Two of torch's kernels lose digits (channels-last group norm, see test_parity) or refuse (instance norm on an empty
    batch); those cases are left out.
    """
    layer, x = form.layer(case, torch.float64), case.input(form, torch.float64)
    for mode in (True, False):
        layer.train(mode)
        truth = Truth(layer, x)
        upstream = truth.upstream()
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        y, running = in_torch(layer, leaf)
        y.backward(upstream)
        seen = {"output": y.detach(), "gradient of input": leaf.grad}
        seen |= {f"gradient of {name}": parameter.grad for name, parameter in layer.named_parameters()}
        seen |= dict(zip(running_statistics(layer), running, strict=True))
        for what, expected in truth.expected(upstream).items():
            assert_matches(seen[what], expected, what)
        layer(x)  # so that evaluation has other statistics than 0 and 1


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("form", [form for form in FORMS if form.dim == 1 or form.label == "-bare"], ids=str)
def test_the_gradients_of_the_reference_are_those_of_finite_differences(form, activation):
    layer = form.layer(NARROW_ROWS, torch.float64, activation=activation)
    x = NARROW_ROWS.input(form, torch.float64).requires_grad_()
    residual = torch.randn_like(x).requires_grad_()
    names = [name for name, _ in layer.named_parameters()]

    def apply(x, residual, *parameters):
        with nk.backend("reference"):
            return torch.func.functional_call(
                layer, dict(zip(names, parameters, strict=True)), x, {"residual": residual}
            )

    assert torch.autograd.gradcheck(apply, (x, residual, *layer.parameters()))


class Operators(TorchDispatchMode):
    """Writes down the name of every operator that runs, whoever calls it."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.add(operator.name())
        return operator(*args, **(kwargs or {}))


def norms_of_torch(backend: str, form, monkeypatch) -> set[str]:
    """Every norm of torch that one training step and one evaluation reach: Python functions and operators."""
    reached = set()
    for module in (F, torch):
        for name, function in inspect.getmembers(module, callable):
            if name.endswith("norm") and name != "norm":
                monkeypatch.setattr(
                    module, name, lambda *a, _f=function, _n=name, **k: (reached.add(_n), _f(*a, **k))[1]
                )
    layer, x = form.layer(ORDINARY), ORDINARY.input(form, torch.float32).requires_grad_()
    with nk.backend(backend), Operators() as operators:
        layer(x).backward(torch.randn_like(x))
        layer.eval()(x)
    return reached | {name for name in operators.names if "norm" in name or "var" in name or "std" in name}


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_reference_calls_no_norm_of_torch(form, monkeypatch):
    assert norms_of_torch("reference", form, monkeypatch) == set()


@pytest.mark.parametrize("form", [form for form in TWINNED if form.spec.over is not None], ids=str)
def test_a_norm_of_torch_would_be_seen(form, monkeypatch):
    assert norms_of_torch("torch", form, monkeypatch) != set()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_reference_computes_in_float64_and_answers_in_the_dtype_of_the_input(form, dtype):
    """Its result is the float64 one, rounded once: no digit is lost on the way."""
    layer, x = form.layer(OFFSET, DTYPES[dtype]), OFFSET.input(form, DTYPES[dtype])
    if getattr(layer, "eps", 0) is None:
        layer.eps = 1e-6
    with nk.backend("reference"):
        y = layer(x)
        exact = layer.double()(x.double())
    assert y.dtype == x.dtype
    assert torch.equal(y, exact.to(y.dtype))


def test_one_value_per_channel_is_refused_in_training():
    layer = nk.BatchNorm1d(3, backend="reference")
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.randn(1, 3))
