"""torch.func, double backward and forward-mode derivatives: wherever torch's layer has them, ours does."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vmap

import normkit as nk
from cases import CASES, FORMS
from twins import TRACKING, VARIANTS, assert_same

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, in forward mode

ORDINARY = CASES[0]
PLANAR = [form for form in FORMS if form.dim == 2]
State = dict[str, Tensor]


def split(layer: nn.Module) -> tuple[State, State]:
    parameters = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    return parameters, {name: buffer.clone() for name, buffer in layer.named_buffers()}


def many(x: Tensor) -> Tensor:
    """Two batches, along a new last axis: what vmap cuts is not contiguous."""
    return torch.stack([x, x.flip(0) * 0.5 - 1], -1)


Apply = Callable[[State, State, Tensor], Tensor]
TRANSFORMS: dict[str, Callable[[Apply, State, State, Tensor], Any]] = {
    "grad": lambda f, p, b, x: grad(lambda p, x: (f(p, b, x) * weights(x)).sum(), argnums=(0, 1))(p, x),
    "vmap": lambda f, p, b, x: vmap(lambda x: f(p, b, x), in_dims=-1)(many(x)),
    "vmap over grad": lambda f, p, b, x: vmap(grad(lambda x: (f(p, b, x) * weights(x)).sum()), in_dims=-1)(many(x)),
    "vmap over grad, sample by sample": lambda f, p, b, x: vmap(grad(lambda p, x: one(f, p, b, x)), (None, 0))(p, x),
    "jacrev": lambda f, p, b, x: jacrev(lambda x: f(p, b, x).flatten()[:3])(x),
    "jacfwd": lambda f, p, b, x: jacfwd(lambda t: f(p, b, x * t))(torch.tensor(1.5)),
    "jvp": lambda f, p, b, x: jvp(lambda p, x: f(p, b, x), (p, x), (p, weights(x))),
    "hessian": lambda f, p, b, x: jacfwd(grad(lambda t: (f(p, b, x * t) * weights(x)).sum()))(torch.tensor(1.5)),
}


def one(f: Apply, p: State, b: State, x: Tensor) -> Tensor:
    """The loss of a single sample, as gradients per sample are asked for."""
    return (f(p, b, x[None]) * weights(x)).sum()


def weights(x: Tensor) -> Tensor:
    """An upstream gradient that is not the same everywhere, and the same whenever it is asked for."""
    return torch.arange(x.numel()).to(x).reshape(x.shape).mul(0.7).cos()


def attempt(call: Callable[[], Any]) -> Any:
    """What it gives, as a flat list of tensors, or the exception that it raises."""
    try:
        return torch.utils._pytree.tree_leaves(call())
    except Exception as error:
        return error


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("twin", [t for t in VARIANTS if t.dim == 2], ids=str)
def test_torch_func_gives_what_it_gives_for_torchs_layer(twin, name, training):
    """The numbers of torch on torch's operators; where torch refuses, so do we, and nothing has moved."""
    ours, torchs = twin.pair()
    ours.train(training), torchs.train(training)
    parameters, x = split(torchs)[0], twin.input()
    results = []
    for layer in (ours, torchs):
        buffers, run = split(layer)[1], lambda p, b, x, layer=layer: functional_call(layer, (p, b), (x,))
        with nk.backend("torch"):
            results.append(attempt(lambda run=run, b=buffers: TRANSFORMS[name](run, parameters, b, x)))
    got, wanted = results
    if training and twin.tracks:  # torch.func does not let a layer move its own statistics
        assert isinstance(got, RuntimeError)
        assert re.search("mutate a captured Tensor|updated in place, were not batched", str(got))
        behind_its_back = twin.spec.name == "instance_norm" and "vmap" not in name  # a deviation: torch's does it
        assert isinstance(wanted, RuntimeError) != behind_its_back
    else:
        assert not isinstance(got, Exception), got
        assert_same(dict(enumerate(got)), dict(enumerate(wanted)))


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("form", PLANAR, ids=str)
def test_every_norm_with_every_option_on_whatever_backend(form, name):
    """Against the same layer on torch's operators and, for one input after the other, without any transform."""
    layer = form.layer(ORDINARY, torch.float64, activation="silu").eval()
    parameters, buffers = split(layer)
    x = ORDINARY.input(form, torch.float64)

    def run(p: State, b: State, x: Tensor) -> Tensor:
        return functional_call(layer, (p, b), (x,), {"residual": x.sin()})

    got = attempt(lambda: TRANSFORMS[name](run, parameters, buffers, x))
    with nk.backend("torch"):
        wanted = attempt(lambda: TRANSFORMS[name](run, parameters, buffers, x))
    assert not isinstance(got, Exception), got
    bound = x.numel() * torch.finfo(x.dtype).eps  # another order of summation, an error per element
    for mine, other in zip(got, wanted, strict=True):
        assert ((mine - other).abs() <= bound * other.abs().max()).all()
    if name == "vmap":
        one_by_one = torch.stack([run(parameters, buffers, x) for x in many(x).unbind(-1)])
        assert ((got[0] - one_by_one).abs() <= bound * one_by_one.abs().max()).all()


@pytest.mark.parametrize("form", PLANAR, ids=str)
def test_double_backward_and_forward_mode_are_the_derivatives(form):
    for training in (True, False):
        layer = form.layer(ORDINARY, torch.float64, activation="gelu").train(training)
        state = split(layer)[1]
        x = ORDINARY.input(form, torch.float64)[:2].detach().requires_grad_()
        residual = torch.randn(x.shape, dtype=x.dtype).requires_grad_()
        names, values = [*dict(layer.named_parameters())], [p.detach().requires_grad_() for p in layer.parameters()]

        def run(x, residual, *values, layer=layer, names=names, state=state):
            given = {**dict(zip(names, values, strict=True)), **{name: b.clone() for name, b in state.items()}}
            return functional_call(layer, given, (x,), {"residual": residual})

        assert gradcheck(run, (x, residual, *values), fast_mode=True, check_forward_ad=True)
        assert gradgradcheck(run, (x, residual, *values), fast_mode=True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("twin", [t for t in VARIANTS if t.dim == 2], ids=str)
def test_an_ensemble_is_its_members_and_torchs(twin, training):
    """stack_module_state: parameters, statistics and counters of every member are its own."""
    members = [twin.layer().train(training) for _ in range(3)]
    with torch.no_grad():
        for layer in members:
            for parameter in layer.parameters():
                parameter.add_(torch.randn_like(parameter))
    others = [twin.torchs(*twin.required(), **twin.options).train(training) for _ in members]
    for layer, other in zip(members, others, strict=True):
        other.load_state_dict(layer.state_dict())
    xs = torch.stack([twin.input() for _ in members])
    seen = []
    with nk.backend("torch"):
        for layers in (members, others):
            parameters, buffers = stack_module_state(layers) if [*layers[0].parameters()] else ({}, stacked(layers))
            base = copy.deepcopy(layers[0])

            def call(p, b, x, base=base):
                return functional_call(base, (p, b), (x,))

            seen.append({"output": vmap(call)(parameters, buffers, xs), **buffers})
        assert_same({name: seen[0][name] for name in seen[1]}, seen[1])
        assert {*seen[0]} - {*seen[1]} == ({"num_batches_skipped", "num_values_tracked"} if twin.tracks else set())
        for i, layer in enumerate(members):
            output = layer(xs[i])
            bound = 8 * torch.finfo(x_dtype := output.dtype).eps * (1 + xs[i].abs().max())
            assert x_dtype == torch.float32
            assert ((seen[0]["output"][i] - output).abs() <= bound).all()
            for name, buffer in layer.named_buffers():
                assert ((seen[0][name][i] - buffer).abs() <= bound * buffer.abs().max()).all()


def stacked(layers: list[nn.Module]) -> State:
    return {name: torch.stack([layer.get_buffer(name) for layer in layers]) for name, _ in layers[0].named_buffers()}


@pytest.mark.parametrize("twin", [t for t in TRACKING if t.dim == 2 and t.spec.name == "batch_norm"], ids=str)
def test_statistics_that_are_handed_in_may_move(twin):
    """What torch.func asks for: the statistics are an argument, and come back changed. torch's layer, the same."""
    results = []
    ours, torchs = twin.pair()
    parameters, x = split(torchs)[0], twin.input()
    for layer in (ours, torchs):

        def loss(x, p, b, layer=layer):
            y = functional_call(layer, (p, b), (x,))
            return (y * weights(y)).sum(), b

        with nk.backend("torch"):
            gradient, buffers = grad(loss, has_aux=True)(x, parameters, split(layer)[1])
        results.append({"gradient": gradient, **buffers})
    assert_same({name: results[0][name] for name in results[1]}, results[1])
    assert results[0]["num_batches_tracked"].item() == 1


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("where", ["input", "residual", "both"])
@pytest.mark.parametrize(
    "make", [lambda: nk.RMSNorm(64).double(), lambda: nk.BatchNorm1d(64, activation="relu").double()]
)
def test_what_a_transform_has_left_behind_is_an_input_like_any_other(make, where, gradients):
    plain = torch.randn(2000, 64, dtype=torch.float64)
    left: list[Tensor] = []
    grad(lambda x: (left.append(x), x.square().sum())[1])(plain)
    x, residual = (left[0] if where in (name, "both") else plain for name in ("input", "residual"))
    layer, expected = make(), make()
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(layer(x, residual=residual), expected(plain, residual=plain))
        if gradients:
            layer(x, residual=residual).square().sum().backward()
            expected(plain, residual=plain).square().sum().backward()
            torch.testing.assert_close(layer.weight.grad, expected.weight.grad)
