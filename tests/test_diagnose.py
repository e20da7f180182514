"""nk.diagnose: what is asked, what is said, as words, as data, and what apply_ does about it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import normkit as nk
from normkit.diagnosis import Diagnosis, DiagnosisError
from normkit.rules import RULES
from normkit.vocabulary.finding import SEVERITIES
from normkit.vocabulary.reading import Reading


def half_frozen() -> nn.Sequential:
    """A convolution and a batch norm that is frozen by half: one error."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    for parameter in model[1].parameters():
        parameter.requires_grad_(False)
    return model


def sound() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())


def test_a_sound_model_is_said_to_be_so_and_what_was_not_asked_is_said_too():
    diagnosis = nk.diagnose(sound())
    assert diagnosis.findings == ()
    assert diagnosis.verdict.startswith("nothing wrong was found")
    assert set(diagnosis.not_asked) <= set(RULES)
    assert "optimizer" in diagnosis.not_asked["norm_parameters_decay"]
    diagnosis.raise_if("note")


def test_the_report_names_the_rule_the_place_the_number_and_what_to_do():
    told = repr(nk.diagnose(half_frozen()))
    for words in ("1 error", "frozen_but_training", "where: 1", "in_training = 1, limit 0", "nk.freeze_(model"):
        assert words in told


def test_findings_are_worst_first():
    model = nn.Sequential(half_frozen(), nn.BatchNorm2d(8, track_running_stats=False))
    optimizer = torch.optim.AdamW(model.parameters())
    severities = [finding.severity for finding in nk.diagnose(model, optimizer=optimizer).findings]
    assert severities == sorted(severities, key=SEVERITIES.index)
    assert len(set(severities)) == 3


def test_raise_if_raises_at_this_severity_and_above():
    diagnosis = nk.diagnose(half_frozen(), select="frozen_but_training")
    for severity in SEVERITIES:
        with pytest.raises(DiagnosisError, match="frozen_but_training") as raised:
            diagnosis.raise_if(severity)
        assert raised.value.diagnosis is diagnosis
    nk.diagnose(nn.BatchNorm1d(3, track_running_stats=False), select="no_running_statistics").raise_if("error")
    with pytest.raises(ValueError, match="choose from: error, warning, note"):
        diagnosis.raise_if("fatal")


def test_json_is_strict_and_complete():
    model = half_frozen()
    with torch.no_grad():
        model[1].running_var[0] = float("nan")
    data = json.loads(json.dumps(nk.diagnose(model).to_json(), allow_nan=False))
    assert data["schema"] == 1
    assert data["counts"]["error"] >= 1
    assert data["model"] == {"class": "Sequential", "parameters": 3 * 8 * 9 + 16, "norms": 1}
    assert {"quantity", "value", "module", "step", "unit"} == set(data["readings"][0])
    found = next(finding for finding in data["findings"] if finding["rule"] == "frozen_but_training")
    assert found["modules"] == ["1"]
    assert found["prescriptions"][0]["code"].startswith("nk.freeze_(model")
    assert data["run"] is None
    assert set(data["environment"]) == {"normkit", "torch", "python"}


def test_rules_are_selected_and_ignored_by_name_and_by_pattern():
    model = half_frozen()
    assert nk.diagnose(model, ignore="frozen_*", select=["frozen_but_training", "no_running_statistics"]).findings == ()
    with pytest.raises(ValueError, match="did you mean 'frozen_but_training'"):
        nk.diagnose(model, select="frozen_training")


def test_apply_treats_what_is_safe_enough_and_diagnoses_again():
    model = half_frozen()
    before = nk.diagnose(model, ignore="norm_parameters_decay")
    assert before.counts["error"] == 1
    untouched = before.apply_("identical")
    assert untouched.counts == before.counts
    assert untouched.certificates == ()
    after = before.apply_("eval_identical")
    assert after.findings == ()
    assert [certificate.operation for certificate in after.certificates] == ["freeze_"]
    assert "done: freeze_" in repr(after)
    after.certificates[0].undo()
    assert nk.diagnose(model).counts["error"] == 1


def test_what_was_read_from_a_run_is_judged_but_not_treated():
    readings = [
        Reading("keeps_statistics", 0.0, "norm", step=100),
        Reading("kind", "batch_norm", "norm"),
    ]
    diagnosis = Diagnosis.of_readings(readings, {"class": "Net"}, run={"steps": 100})
    assert [finding.rule for finding in diagnosis.findings] == ["no_running_statistics"]
    assert diagnosis.to_json()["run"] == {"steps": 100}
    with pytest.raises(RuntimeError, match="no model at hand"):
        diagnosis.apply_()
