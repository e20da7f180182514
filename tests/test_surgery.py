"""The operating table: all or nothing, verified, certified, taken back."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from normkit.surgery import Plan, operate, probe
from normkit.vocabulary.certificate import Agreement, Certificate, Untouched
from normkit.vocabulary.prescription import MEANING, Prescription
from normkit.vocabulary.reading import Reading


@dataclass
class Do:
    """An edit made of two functions, which keeps a diary."""

    forth: Callable[[], object]
    back: Callable[[], object] = lambda: None
    diary: list[str] = field(default_factory=list)
    name: str = ""

    def apply(self) -> None:
        self.forth()
        self.diary.append(f"+{self.name}")

    def revert(self) -> None:
        self.back()
        self.diary.append(f"-{self.name}")

    def objections(self) -> list[str]:
        return []


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def planned(model: nn.Module, *edits: Do, safety: str = "identical") -> Plan:
    plan = Plan("operation", model)
    for edit in edits:
        plan.add(Prescription("something is done", edit.name, "because", safety), edit)
    return plan


def fail() -> None:
    raise ArithmeticError("the third step fails")


def test_when_a_step_fails_the_others_are_taken_back_in_reverse_order():
    model, diary = small(), []
    before = dict(vars(model[1]))
    edits = [
        Do(lambda: setattr(model[1], "one", 1), lambda: delattr(model[1], "one"), diary, "one"),
        Do(lambda: setattr(model[1], "two", 2), lambda: delattr(model[1], "two"), diary, "two"),
        Do(fail, fail, diary, "three"),
    ]
    with pytest.raises(ArithmeticError):
        operate(planned(model, *edits))
    assert diary == ["+one", "+two", "-two", "-one"]
    assert dict(vars(model[1])) == before


def test_a_result_that_moved_is_taken_back_and_the_error_has_the_numbers():
    model = small()
    weight = model[0].weight.detach().clone()

    def change(factor: float) -> None:
        with torch.no_grad():
            model[0].weight.mul_(factor)
            model[1].eps *= factor

    x = torch.randn(9, 3) * 4 + 2
    with pytest.raises(RuntimeError, match=r"(?s)the model is as it was.*in evaluation moved by \d.*limit 3\.5e-04"):
        operate(planned(model, Do(lambda: change(2.0), lambda: change(0.5))), example_inputs=x)
    assert torch.equal(model[0].weight, weight)


@pytest.mark.parametrize(
    ("safety", "accepted"),
    [("identical", False), ("train_identical", True), ("eval_identical", False), ("retrain", True)],
)
def test_a_safety_is_held_in_the_modes_that_it_promises(safety, accepted):
    model, x = small(), torch.randn(9, 3) * 4 + 2
    last, original = model[2], model[2].forward
    differs_in_evaluation = lambda y: original(y) if last.training else original(y) + 1
    change = Do(lambda: setattr(last, "forward", differs_in_evaluation), lambda: delattr(last, "forward"))
    plan = planned(model, change, safety=safety)
    if accepted:
        certificate = operate(plan, example_inputs=x)
        assert tuple(row.training for row in certificate.agreement) == plan.steps[0].prescription.modes
    else:
        with pytest.raises(RuntimeError, match="in evaluation moved"):
            operate(plan, example_inputs=x)
        assert "forward" not in vars(last)


@pytest.mark.parametrize(
    ("lose", "sentence"),
    [
        (lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach().clone())), "parameter '0.weight'"),
        (lambda m: m[0].weight.requires_grad_(False), "parameter '0.weight'"),
        (lambda m: setattr(m[1], "running_mean", m[1].running_mean.clone()), "buffer '1.running_mean'"),
        (lambda m: m[1].eval(), "the mode of '1'"),
        (lambda m: m.__setitem__(2, nn.Linear(4, 2)), "module '2'"),
        (lambda m: m[1].register_buffer("late", torch.zeros(1)), "the keys of the state_dict have changed"),
        (lambda m: m[1]._forward_hooks.clear(), "the hooks of '1'"),
        (lambda m: m[1].register_forward_pre_hook(lambda module, args: None), "the hooks of '1'"),
    ],
)
def test_whatever_is_lost_is_named(lose, sentence):
    model = small()
    model[1].register_forward_hook(lambda module, args, output: None)
    with pytest.raises(RuntimeError) as caught:
        operate(planned(model, Do(lambda: lose(model))))
    assert sentence in str(caught.value)


def test_an_empty_plan_runs_nothing():
    certificate = operate(Plan("operation", nn.Identity()), example_inputs="not even an input")
    assert certificate.verdict == "operation: nothing was changed."
    with pytest.raises(RuntimeError, match="nothing to take back"):
        certificate.undo()


def test_a_plan_can_be_read_before_it_is_carried_out():
    plan = planned(small(), Do(fail, name="layer"))
    plan.skip("other", "left out")
    assert repr(plan).splitlines()[0] == "operation (planned): 1 x something is done; 1 skipped."


CERTIFICATE = Certificate(
    "operation",
    (Prescription("norm replaced", "a.b", "faster", detail="to <this>"), Prescription("norm replaced", "", "faster")),
    (Untouched("c", "left out"),),
    (Untouched("d", "has hooks & more"),),
    (Agreement(False, 1e-7, 3e-4),),
)


def test_a_certificate_reads_as_a_table():
    assert repr(CERTIFICATE).splitlines() == [
        "operation: 2 x norm replaced; 1 skipped, 1 refused.",
        "  greatest error in evaluation: 1.0e-07 (limit 3.0e-04)",
        "  changed  a.b          norm replaced: to <this> (identical)",
        "  changed  (the model)  norm replaced (identical)",
        "  refused  d            has hooks & more",
        "  skipped  c            left out",
    ]


def test_a_long_table_says_how_much_it_leaves_out():
    rows = tuple(Untouched(f"m{i}", "left out") for i in range(100))
    lines = repr(Certificate("operation", skipped=rows)).splitlines()
    assert len(lines) == 2 + 31
    assert "and 70 more" in lines[-1]
    assert len(Certificate("operation", skipped=rows).to_json()["skipped"]) == 100


def test_a_certificate_in_a_notebook_is_escaped():
    page = CERTIFICATE._repr_html_()
    assert "to &lt;this&gt;" in page
    assert "has hooks &amp; more" in page
    assert page.count("<tr>") == 5


def test_a_certificate_is_plain_data():
    data = json.loads(json.dumps(CERTIFICATE.to_json()))
    assert data["changed"][0]["detail"] == "to <this>"
    assert data["refused"] == [{"module": "d", "reason": "has hooks & more"}]
    assert data["agreement"] == [{"training": False, "error": 1e-7, "limit": 3e-4}]


def test_safeties_and_readings():
    assert list(MEANING) == ["identical", "train_identical", "eval_identical", "retrain"]
    with pytest.raises(ValueError, match="choose from: identical, train_identical, eval_identical, retrain"):
        Prescription("a", "b", "c", safety="safe")
    assert Reading("drift", 0.5, "layer1.bn1", unit="standard deviations").step is None


def test_a_model_that_draws_numbers_of_python_and_numpy_draws_the_same_ones_on_each_probe():
    np = pytest.importorskip("numpy", reason="numpy is not installed")

    class Augmenting(nn.Module):
        def forward(self, x):
            return x * np.random.rand() * random.random() * torch.rand(())

    model, state = Augmenting(), (random.getstate(), np.random.get_state()[1].copy())
    first, second = (probe.run(model, torch.ones(3), training=True).tensors["output 0"] for _ in range(2))
    assert torch.equal(first, second)
    assert state[0] == random.getstate()
    assert (state[1] == np.random.get_state()[1]).all()
