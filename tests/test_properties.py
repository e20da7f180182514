"""Any shape, any memory: what hypothesis finds for a norm must agree with the truth as the chosen cases do."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cases import FORMS, ORDINARY, Case, Form, channels_last, ordinary
from normkit.dispatch import BACKENDS
from oracle import Expected, Truth, assert_matches, examine, observe, refusal

STANDING = [form for form in FORMS if not form.trailing]


@st.composite
def memories(draw, axes: int):
    """A function that lays a tensor out anew: axes in any order, gaps after some, one of them with stride 0."""
    order = draw(st.permutations(range(axes)))
    step = draw(st.sampled_from([1, 1, 2, 3]))
    repeated = draw(st.sampled_from([None, None, *range(axes)]))

    def stored(x: torch.Tensor) -> torch.Tensor:
        inverse = [order.index(axis) for axis in range(axes)]
        x = x.permute(order).contiguous().permute(inverse)
        if step > 1:
            wide = x.new_full((*x.shape[:-1], step * x.shape[-1]), torch.nan)
            wide[..., ::step] = x
            x = wide[..., ::step]
        return x if repeated is None or not x.shape[repeated] else x.narrow(repeated, 0, 1).expand_as(x)

    return stored


@st.composite
def meetings(draw) -> tuple[Form, Case]:
    """A form, and a case of its own: any sizes, any memory."""
    form = draw(st.sampled_from(FORMS))
    sizes = st.integers(1, 5)
    case = Case(
        "drawn",
        "hypothesis chose it",
        ordinary,
        samples=draw(st.integers(0, 4)),
        channels=4 * draw(sizes),
        space=(draw(sizes), draw(sizes), draw(sizes)),
        stored=draw(memories(2 + form.dim)),
    )
    return form, case


def single_values(form: Form, case: Case) -> bool:
    """Whether a statistic would be of one value: torch refuses it, or normkit warns."""
    points = math.prod(case.space[: form.dim])
    values = {"batch_norm": case.samples * points, "instance_norm": points, "group_norm": points * case.channels // 4}
    return values.get(form.name, 0) == 1


def next_to_each_other(x: torch.Tensor) -> bool:
    """Channels-last: torch's group norm then takes E[x²] - E[x]², see test_parity."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()])


@pytest.mark.parametrize("examples", [200, pytest.param(6000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape_in_any_memory(backend, examples):
    @settings(max_examples=examples)
    @given(meetings(), st.sampled_from([torch.float64, torch.float32]), st.booleans(), st.integers(0, 10**6))
    def agrees(meeting, dtype, with_residual, seed):
        agree_on(backend, *meeting, dtype, with_residual, seed)

    agrees()


def agree_on(backend: str, form: Form, case: Case, dtype: torch.dtype, with_residual: bool, seed: int) -> None:
    torch.manual_seed(seed)
    layer, x = form.layer(case, dtype, activation="leaky_relu", backend=backend), case.input(form, dtype)
    assume(not single_values(form, case))
    assume(not (backend == "torch" and form.name == "group_norm" and next_to_each_other(x)))
    residual = case.input(form, dtype) if with_residual else None
    if not refusal(backend, layer, x, residual):
        examine(layer, x, residual)


def upstream_in(stored, odd: int | None, like: torch.Tensor) -> torch.Tensor:
    """A random gradient; axes of size 1, whose stride says nothing, have the stride ``odd``."""
    upstream = stored(torch.randn_like(like))
    strides = [odd if odd and size == 1 else step for size, step in zip(upstream.shape, upstream.stride(), strict=True)]
    return upstream.as_strided(upstream.shape, strides)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_upstream_gradient_may_lie_anywhere(backend):
    """``y.mean()`` sends back strides of 0; behind a view, an axis of size 1 may come with any stride."""

    @settings(max_examples=120)
    @given(meetings(), st.data(), st.sampled_from([None, 1, 7]), st.booleans(), st.integers(0, 10**6))
    def agrees(meeting, data, odd, training, seed):
        form, case = meeting
        torch.manual_seed(seed)
        layer, x = form.layer(case, torch.float64, backend=backend).train(training), case.input(form, torch.float64)
        stored = data.draw(memories(x.dim()))
        assume(not single_values(form, case))
        assume(not (backend == "torch" and form.name == "group_norm" and next_to_each_other(x)))
        if refusal(backend, layer, x):
            return
        upstream = upstream_in(stored, odd, x)
        expected = Truth(layer, x).expected(upstream)
        seen = observe(layer, x, None, upstream)
        for what, value in expected.items():
            assert_matches(seen[what], value, what)

    agrees()


@pytest.mark.parametrize("stored", [torch.Tensor.contiguous, channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("form", [form for form in STANDING if form.dim > 1], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_one_gets_its_gradient_in_channels_last_and_behind_a_view(backend, form, stored):
    """torch's batch norm and instance norm are wrong here by more than the size of the gradient (CPU, torch 2.13)."""
    case = dataclasses.replace(ORDINARY, samples=1)
    layer, x = form.layer(case, backend=backend), stored(case.input(form, torch.float32))
    if why := refusal(backend, layer, x):
        pytest.skip(why)
    truth = Truth(layer, x)
    upstream = channels_last(truth.upstream())
    expected = truth.expected(upstream)["gradient of input"]
    for after in (lambda y: y, lambda y: y.view(y.shape), lambda y: y.squeeze(0).unsqueeze(0)):
        leaf = x.detach().requires_grad_()
        after(layer(leaf)).backward(upstream)
        assert_matches(leaf.grad, expected, "gradient of input")


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("form", [form for form in STANDING if form.dim > 1], ids=str)
def test_the_output_lies_in_memory_as_the_input_does(form, with_residual, mode):
    layer = form.layer(ORDINARY, activation="relu").train(mode == "train")
    x = ORDINARY.input(form, torch.float32)
    for laid in (x, channels_last(x)):
        y = layer(laid, residual=laid.clone() if with_residual else None)
        assert y.stride() == laid.stride()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_input_residual_and_parameters_are_only_read(form, backend):
    layer = form.layer(ORDINARY, activation="relu", backend=backend)
    x, residual = ORDINARY.input(form, torch.float32), ORDINARY.input(form, torch.float32)
    if why := refusal(backend, layer, x, residual):
        pytest.skip(why)
    read = [x.requires_grad_(), residual, *layer.parameters()]
    before = [tensor.detach().clone() for tensor in read]
    layer(x, residual=residual).backward(torch.randn_like(x))
    assert all(torch.equal(old, new) for old, new in zip(before, read, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_residual_may_be_the_input(form, backend):
    """As in ``x + norm(x)``: both gradients meet in one tensor."""
    layer, x = form.layer(ORDINARY, backend=backend), ORDINARY.input(form, torch.float32)
    if why := refusal(backend, layer, x, x):
        pytest.skip(why)
    truth = Truth(layer, x, x)
    upstream = truth.upstream()
    expected = truth.expected(upstream)
    leaf = x.clone().requires_grad_()
    layer(leaf, residual=leaf).backward(upstream)
    through, beside = expected["gradient of input"], expected["gradient of residual"]
    both = Expected(through.value + beside.value, through.bound + beside.bound)
    assert_matches(leaf.grad, both, "both gradients")


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_needs_no_gradient_gets_none(form):
    layer, x = form.layer(ORDINARY), ORDINARY.input(form, torch.float32)
    layer.requires_grad_(False)
    assert not layer(x).requires_grad
    leaf = x.clone().requires_grad_()
    layer(leaf).backward(torch.randn_like(x))
    assert leaf.grad is not None
    assert all(parameter.grad is None for parameter in layer.parameters())
    layer.requires_grad_(True)
    assert layer(x).requires_grad == bool(list(layer.parameters()))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_same_input_gives_the_same_bits(form):
    layer, x = form.layer(ORDINARY), ORDINARY.input(form, torch.float32)
    assert torch.equal(layer(x), layer(x))
