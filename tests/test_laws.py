"""What a norm claims to be invariant to holds, and what it does not claim is broken by a witness.

The tables of ``normkit list``, the README and the docs are printed from the same claims.
"""

from __future__ import annotations

import pytest
import torch

import normkit as nk
from cases import CASES, FORMS, ORDINARY, Case, Form
from normkit.laws import LAWS
from normkit.vocabulary import spec
from oracle import Truth

# Laws speak of (n, c, s...), and of layers that have a weight and a bias if the norm has them at all.
STANDING = [form for form in FORMS if not form.trailing and form.label != "-bare"]
INPUTS = [
    case for case in CASES if case.name in ("ordinary", "uneven_samples", "uneven_channels", "offset", "tail", "narrow")
]
VISIBLE = 1e-2
"""What breaks a law breaks it by more than a percent of the largest output."""


def setting(form: Form, case: Case) -> tuple[torch.nn.Module, torch.Tensor]:
    """In float64 and with an epsilon that no variance here can feel: a law holds to rounding or not at all."""
    layer, x = form.layer(case, torch.float64), case.input(form, torch.float64)
    if hasattr(layer, "eps"):
        layer.eps = 1e-30
    return layer, x


def rounding(form: Form, case: Case) -> float:
    """The deviation that rounding explains: scaled and shifted inputs are up to 3 times as large, and 3 off.

    Some hundred roundings, as in sums over some hundred values, each of them amplified as the oracle says.
    """
    layer, x = setting(form, case)
    truth = Truth(layer, x)
    largest = 3 * x.abs().max() + 3
    spread = 100 * torch.finfo(x.dtype).eps / truth.output.detach().abs().max().clamp(max=1)
    return float(spread * (1 + (largest * truth.rstd).max()))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("form", STANDING, ids=str)
def test_a_law_is_claimed_if_and_only_if_it_holds(form, law, backend):
    with nk.backend(backend):
        if law in form.spec.laws:
            for case in INPUTS:
                assert LAWS[law].residual(*setting(form, case)) <= rounding(form, case), case.why
        else:
            witness = LAWS[law].residual(*setting(form, ORDINARY))
            assert witness > VISIBLE


SCALES = {"scale": 1.0, "sample_scale": 0.5, "channel_scale": 0.5}
"""Laws of scale, and the smallest factor with which they are measured, if it is below 1."""


@pytest.mark.parametrize(
    ("form", "law"), [(form, law) for form in STANDING for law in SCALES if law in form.spec.laws], ids=str
)
def test_epsilon_bends_a_law_of_scale_by_epsilon_over_variance(form, law):
    """1 / sqrt(var + eps) against s / sqrt(s² var + eps): they differ by a part of eps / (2 * the smaller variance)."""
    layer, x = form.layer(ORDINARY, torch.float64), ORDINARY.input(form, torch.float64)
    layer.eps = 1e-3
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.fill_(1.0 if name == "weight" else 0.0)
    least_variance = SCALES[law] ** 2 * float(1 / Truth(layer, x).rstd.max() ** 2 - layer.eps)
    bent = LAWS[law].residual(layer, x)
    assert 0 < bent <= layer.eps / (2 * least_variance)


def test_the_names_of_the_laws_are_the_vocabulary_in_the_order_of_the_tables():
    assert tuple(LAWS) == spec.LAWS
    assert all(law.name == name and law.statement for name, law in LAWS.items())


def test_measuring_a_law_changes_neither_the_layer_nor_the_input():
    for form in STANDING:
        layer, x = setting(form, ORDINARY)
        parameters, before = [parameter.clone() for parameter in layer.parameters()], x.clone()
        for law in LAWS.values():
            law.residual(layer, x)
        assert torch.equal(x, before)
        assert all(torch.equal(old, new) for old, new in zip(parameters, layer.parameters(), strict=True))


def test_an_unknown_law_is_refused():
    with pytest.raises(ValueError, match=r"odd: unknown laws \['rotation'\]; the laws are scale, shift"):
        nk.Spec(name="odd", summary="", over=None, center=False, laws=frozenset({"rotation"}), twin=None, paper="")
