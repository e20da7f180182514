"""The test of the tests: the oracle accepts a correct kernel that it has never seen, and rejects every wrong one."""

from __future__ import annotations

import copy
import inspect
import itertools

import pytest
import torch

import normkit as nk
from cases import CASES, DTYPES, FORMS, ORDINARY
from mutants import MUTANTS, Kernel, Use, kernel_backend
from normkit import dispatch
from oracle import Expected, assert_matches, examine

# What no pattern says has no kernel but torch's operators, which parity holds against the truth.
PLANE = [form for form in FORMS if form.dim == 2 and not form.spec.pools]
WRONG = [
    pytest.param(mutant, form, dtype, id=f"{mutant.__name__}-{form}-{dtype}")
    for mutant in MUTANTS
    for form in PLANE
    for dtype in mutant.dtypes
    if form.spec.over is not None or dtype == "float32"  # operators that each round to 8 bits may be wrong by a percent
]


def is_spared(mutant, form, dtype) -> bool:
    return mutant.spares(Use(form.spec, form.layer(ORDINARY), DTYPES[dtype]))


def trials(form, dtype):
    """The inputs that judge one kernel, each with the layer it goes through: parity runs all of these and more."""
    for case in CASES:
        if form.takes(case) and dtype in case.dtypes:
            torch.manual_seed(1)
            x, layer = case.input(form, DTYPES[dtype]), form.layer(case, DTYPES[dtype])
            yield case.name, layer, x, None
            if case is ORDINARY:
                yield f"{case.name} with a residual", layer, x, torch.randn_like(x)
                activated = form.layer(case, DTYPES[dtype], activation="silu")
                yield f"{case.name} with residual and activation", activated, x, torch.randn_like(x)
                yield f"{case.name} in evaluation", copy.deepcopy(layer).eval(), x, None


def rejection(kernel, form, dtype, monkeypatch, *, of_the_first: int | None = None) -> str:
    """The words in which the oracle rejects a kernel in the first trial that it fails; empty: it passes all."""
    monkeypatch.setattr(dispatch, "BACKENDS", {"kernel": kernel_backend(kernel), **dispatch.BACKENDS})
    with nk.backend("kernel"):
        for name, layer, x, residual in itertools.islice(trials(form, dtype), of_the_first):
            try:
                examine(layer, x, residual)
            except AssertionError as error:
                return f"{name}: {error}"
    return ""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", PLANE, ids=str)
def test_a_correct_kernel_is_accepted(form, dtype, monkeypatch):
    assert rejection(Kernel, form, dtype, monkeypatch) == ""


@pytest.mark.parametrize(("mutant", "form", "dtype"), WRONG)
def test_a_wrong_kernel_is_rejected(mutant, form, dtype, monkeypatch):
    """And where a mistake makes no difference, the oracle does not see one."""
    if is_spared(mutant, form, dtype):
        assert rejection(mutant, form, dtype, monkeypatch, of_the_first=4) == ""
    else:
        assert rejection(mutant, form, dtype, monkeypatch)


def test_every_step_of_the_kernel_has_its_mutant():
    steps = {name for name, value in vars(Kernel).items() if inspect.isfunction(value) and not name.startswith("_")}
    changed = {name for mutant in MUTANTS for cls in mutant.__mro__[: -len(Kernel.__mro__)] for name in vars(cls)}
    assert steps - changed <= {"run", "split", "elementwise", "move"}
    assert len(MUTANTS) >= 25


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_no_mutant_is_spared_everywhere(mutant):
    assert not all(is_spared(mutant, form, dtype) for form in PLANE for dtype in mutant.dtypes)


@pytest.mark.parametrize(
    "got",
    [
        None,
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([1.0, torch.nan]),
        torch.tensor([1.0, torch.inf]),
        torch.tensor([1.0, 2.1]),
        torch.tensor([1.0, 2.0, 3.0]),
        torch.tensor([2.0]),
    ],
    ids=["nothing", "shape", "nan", "infinity", "value", "longer", "broadcast"],
)
def test_what_does_not_match_is_said(got):
    expected = Expected(torch.tensor([1.0, 2.0]).double(), torch.tensor([0.0, 0.05]).double())
    assert_matches(torch.tensor([1.0, 2.04]), expected, "output")
    with pytest.raises(AssertionError, match="output: "):
        assert_matches(got, expected, "output")


def test_a_truth_that_is_nan_matches_nothing():
    nan = torch.full((1,), torch.nan, dtype=torch.float64)
    with pytest.raises(AssertionError, match="1 of 1 elements are wrong"):
        assert_matches(nan, Expected(nan, torch.zeros_like(nan)), "output")
