"""Every rule finds the sick, leaves the well in peace, and is content with the cured."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

import normkit as nk
from normkit import rules
from normkit.finding_words import experiments
from normkit.lab.arm import parse_arm
from normkit.rules import MENU, RULES
from normkit.rules.judge import judge
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.reading import Reading
from normkit.vocabulary.spec import REGISTRY
from normkit.watching.quantities import ALL as QUANTITIES
from rule_cases import CASES, Case

ids = lambda case: f"{case.rule}{'-' if case.name else ''}{case.name}"


def test_the_menu_has_every_file_and_every_rule_its_cases():
    files = {path.stem for path in Path(rules.__file__).parent.glob("*.py")}
    assert files - {"__init__", "rule", "judge", "wording"} == set(MENU) == {case.rule for case in CASES}
    assert [rule.name for rule in RULES.values()] == list(MENU)


def test_names_of_rules_are_no_names_of_norms():
    taken = {alias for family in REGISTRY.values() for alias in (family.spec.name, *family.spec.aliases)}
    assert taken.isdisjoint(RULES)


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
def test_a_rule_says_what_it_finds_why_it_hurts_when_it_is_wrong_and_who_says_so(rule):
    for sentence in (rule.finds, rule.means, rule.false_alarms):
        assert sentence.endswith(".")
    assert rule.references
    assert isinstance(rule.references, tuple)
    assert all(len(reference) > 8 for reference in rule.references)
    assert rule.needs


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
def test_a_rule_without_evidence_has_nothing_to_say(rule):
    assert list(rule.find(Evidence([]))) == []


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_the_sick_are_found_and_cured(case: Case):
    asked = case.sick()
    found = asked.diagnose(case.rule)
    assert found.findings, f"{case.rule} did not find it"
    finding = found.findings[0]
    assert (finding.rule, finding.severity) == (case.rule, case.severity)
    assert finding.prescriptions
    assert all(prescription.code for prescription in finding.prescriptions)
    assert finding.quantity in QUANTITIES
    if case.cure is not None:
        assert case.cure(asked).diagnose(case.rule).findings == ()
        return
    cured = found.apply_(case.safety, **case.given)
    assert cured.findings == ()
    assert cured.certificates
    for certificate in cured.certificates:
        assert certificate.changed
        assert all(row.error <= row.limit for row in certificate.agreement)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_what_is_prescribed_is_python(case: Case):
    for finding in case.sick().diagnose(case.rule).findings:
        for prescription in finding.prescriptions:
            compile(prescription.code, case.rule, "exec")
            assert prescription.reason
            assert prescription.safety == "retrain" or not prescription.arms
        for command in experiments(finding):
            *_, arms = shlex.split(command)
            assert len([parse_arm(arm) for arm in arms.split(",")]) == 2


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_the_well_are_left_in_peace(case: Case):
    assert case.well().diagnose(case.rule).findings == ()


def test_a_rule_that_lacks_a_quantity_is_not_asked_and_the_reason_is_given():
    rule = RULES["train_eval_gap"]
    _, not_asked = judge([rule], Evidence([]), {"batch_statistics_gap": "a batch"})
    assert not_asked == {"train_eval_gap": "batch_statistics_gap was not measured; it takes a batch"}


NAN = float("nan")


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ([1.0] * 6 + [NAN] * 3, []),  # the loss is NaN because the gradient was
        ([1.0] * 5 + [9.0] + [NAN] * 3, ["loss_spikes"]),  # and this may be why
    ],
)
@pytest.mark.parametrize("lost", ["first_nan", "gradient_nonfinite"])
def test_what_comes_after_a_nan_is_not_told_beside_it(losses, told, lost):
    first = Reading(lost, "the batch has it" if lost == "first_nan" else 3.0, "weight", 6)
    readings = [first, *(Reading("loss", loss, "", step) for step, loss in enumerate(losses))]
    readings += [
        Reading("activation_std", NAN if step > 5 else 1.0, str(place), step) for step in (5, 6) for place in (1, 2, 3)
    ]
    found, _ = judge(RULES.values(), Evidence(readings), {})
    cause = "first_nan" if lost == "first_nan" else "non_finite_gradients"
    assert [finding.rule for finding in found] == [cause, *told]


def test_a_weight_that_is_nan_is_told_and_not_the_activations_behind_it():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    with torch.no_grad():
        model[0].weight[0, 0] = NAN
    rules = [f.rule for f in nk.diagnose(model, torch.randn(8, 4)).findings if f.severity == "error"]
    assert rules == ["non_finite_parameters"]
    overflowing = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    nn.init.constant_(overflowing[0].weight, 1e3)
    found = nk.diagnose(overflowing, 1e38 * torch.ones(8, 4), select=["signal_lost_with_depth"])
    assert found.findings[0].claim == "the activations of 1 are not finite"  # here it is where it begins


def test_a_diagnosis_leaves_the_model_bit_for_bit_as_it_was():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    nk.diagnose(model, (torch.randn(8, 1, 9, 9), torch.zeros(8)), lambda y, t: y.sum())
    assert torch.equal(torch.get_rng_state(), state) is False  # the batch was drawn here
    state = torch.get_rng_state()
    nk.diagnose(model, torch.ones(8, 1, 9, 9))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
