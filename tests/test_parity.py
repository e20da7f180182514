"""Every backend against the truth: every norm in every form, every input, every type, forward and backward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import normkit as nk
from cases import CASES, DTYPES, FORMS, ORDINARY, Case, Form, meetings
from normkit.dispatch import BACKENDS
from normkit.epilogue import ACTIVATIONS
from oracle import examine, refusal, running_statistics

LAST_OFFSET = next(case for case in CASES if case.name == "channels_last_offset")
ACTIVATED = [case for case in CASES if case.name in ("ordinary", "uneven_samples")]


def statistics_dtype(backend: str, dtype: torch.dtype) -> torch.dtype:
    """In what a backend keeps mean and 1 / sigma between forward and backward: float32 or better, but for torch.

    torch's CPU kernels keep them in the type of the parameters, or of the input where there are none.
    """
    return dtype if backend == "torch" else torch.float32


def loses_its_digits(backend: str, form: Form, case: Case, dtype: torch.dtype) -> bool:
    """torch's group norm takes E[x²] - E[x]² where the channels lie next to each other (CPU)."""
    wide = dtype.itemsize > 2
    return backend == "torch" and form.name == "group_norm" and case is LAST_OFFSET and wide


@pytest.mark.parametrize(("form", "case"), meetings())
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_gives_what_the_norm_says(backend, form, case):
    refused = []
    for dtype in (DTYPES[name] for name in case.dtypes):
        layer, x = form.layer(case, dtype, backend=backend), case.input(form, dtype)
        if why := refusal(backend, layer, x):
            refused.append(why)
        elif loses_its_digits(backend, form, case, dtype):
            with pytest.raises(AssertionError, match="output: "):  # red when torch mends it
                examine(layer, x)
        else:
            examine(layer, x, arithmetic=statistics_dtype(backend, dtype))
    if len(refused) == len(case.dtypes):
        pytest.skip(refused[0])


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS, nn.GELU("tanh"), nn.LeakyReLU(0.3), nn.Tanh()], ids=str)
@pytest.mark.parametrize("form", [form for form in FORMS if form.dim == 2], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_residual_and_activation_are_the_steps_written_by_hand(backend, form, activation):
    for dtype in (torch.float32, torch.bfloat16):
        for case in ACTIVATED:
            layer = form.layer(case, dtype, activation=activation, backend=backend)
            x, residual = case.input(form, dtype), 3 * case.input(form, dtype) - 1
            for added in (residual, None):
                if why := refusal(backend, layer, x, added):
                    pytest.skip(why)
                examine(layer, x, added, arithmetic=statistics_dtype(backend, dtype))


RUNNING = [form for form in FORMS if running_statistics(form.layer(ORDINARY))]


def moments_by_hand(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased variance of each statistic, averaged over those that meet in one channel."""
    problem = nk.explain(layer, x).problem
    if problem is None:  # no pattern says it; what is kept is the batch's
        view, pooled = x.shape, tuple(axis for axis in range(x.dim()) if axis != 1)
    else:
        view, pooled = problem.view, problem.pooled
    x = x.double().reshape(view)
    mean, var = x.mean(pooled), x.var(pooled, correction=1)
    return mean.reshape(-1, layer.num_features).mean(0), var.reshape(-1, layer.num_features).mean(0)


@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None])
@pytest.mark.parametrize("form", RUNNING, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_running_statistics_after_some_steps_and_what_evaluation_makes_of_them(backend, form, momentum):
    """The errors of three steps add; each is that of one mean and one variance in float32 or better."""
    for dtype in DTYPES.values():
        layer = form.layer(ORDINARY, dtype, momentum=momentum, backend=backend)
        if why := refusal(backend, layer, ORDINARY.input(form, dtype)):
            pytest.skip(why)
        mean, var = torch.zeros(ORDINARY.channels).double(), torch.ones(ORDINARY.channels).double()
        for step in range(3):
            x = (ORDINARY.input(form, dtype) * (step + 1)).to(dtype)  # each step has another mean and another variance
            layer(x)
            share = momentum
            if momentum is None:  # the average over all steps; instance norm in torch: 0
                share = 0.0 if form.name == "instance_norm" else 1 / (step + 1)
            of_batch = moments_by_hand(layer, x)
            mean, var = (torch.lerp(old, new, share) for old, new in zip((mean, var), of_batch, strict=True))
        for got, wanted in ((layer.running_mean, mean), (layer.running_var, var)):
            assert got.dtype == torch.promote_types(dtype, torch.float32)
            error = 3 * 4 * torch.finfo(got.dtype).eps * (1 + x.double().abs().max()) ** 2
            assert ((got - wanted).abs() <= error).all()
        examine(layer.eval(), x, arithmetic=statistics_dtype(backend, dtype))


@pytest.mark.parametrize("form", RUNNING, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_leaves_the_running_statistics_alone(backend, form):
    layer, x = form.layer(ORDINARY, backend=backend), ORDINARY.input(form, torch.float32)
    if why := refusal(backend, layer, x):
        pytest.skip(why)
    layer(x)
    before = copy.deepcopy(layer.state_dict())
    layer.eval()(2 * x)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("given", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_running_statistics_in_float32_stand_beside_numbers_of_any_type(given):
    """torch's CPU operator wants weight and bias in the type of the running statistics, each where it is given."""
    x = ORDINARY.input(FORMS[0], torch.bfloat16)
    running = torch.zeros(ORDINARY.channels), torch.ones(ORDINARY.channels)
    weight, bias = (torch.rand(ORDINARY.channels).bfloat16() if has else None for has in given)
    results = []
    for number in (torch.bfloat16, torch.float32):
        affine = [None if p is None else p.to(number) for p in (weight, bias)]
        results.append(nk.functional.batch_norm(x, *(s.clone() for s in running), *affine, True, backend="torch"))
    assert results[0].dtype == torch.bfloat16
    assert torch.equal(*results)
