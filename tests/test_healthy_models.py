"""Nothing is wrong with these networks, and the doctor says so: no error, and at most one warning each."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

import healthy_models
import normkit as nk

RECORD = Path(__file__).parent.parent / "records" / "doctor" / "healthy.json"
QUICK = ("mlp, batch norm", "residual, group norm", "LSTM", "one network on two halves")


def in_peace(patient: healthy_models.Patient) -> list[str]:
    """Rules that warn. Whatever the numbers, none of them is an error."""
    found = nk.diagnose(patient.model, patient.batch, patient.loss_fn, patient.optimizer)
    warned = [finding.rule for finding in found.findings if finding.severity == "warning"]
    assert found.counts["error"] == 0, found
    assert len(warned) <= 1, found
    return warned


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in healthy_models.OWN]
)
def test_a_healthy_model_is_left_in_peace(name):
    assert in_peace(healthy_models.trained(healthy_models.OWN[name]())) == []


@pytest.mark.slow
@pytest.mark.parametrize("task", healthy_models.LAB, ids=lambda task: "-".join(map(str, task[:2])))
def test_the_networks_of_compare_are_left_in_peace(task):
    assert in_peace(healthy_models.lab_task(*task)) == []


def hosted_names() -> list[str]:
    return json.loads(RECORD.read_text())["hosted"]


@pytest.mark.slow
@pytest.mark.parametrize("name", hosted_names())
@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="transformers is not installed: `make test-all` installs it",
)
def test_networks_of_transformers_are_left_in_peace(name):
    warned = in_peace(healthy_models.hosted(name))
    assert set(warned) <= {"dead_activations"}  # a bottleneck of two units, with weights that nobody has trained


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="transformers is not installed: `make test-all` installs it",
)
@pytest.mark.parametrize(("name", "momentum"), [("efficientnet", 0.99), ("mobilenet_v2", 0.997)])
def test_a_momentum_that_counts_the_other_way_round_is_found_in_configurations_of_transformers(name, momentum):
    import hosted_models

    (finding,) = nk.diagnose(hosted_models.MODELS[name][0](), select="momentum_reversed").findings
    assert finding.measured == momentum


def test_the_count_in_the_record_is_the_count_here(capsys):
    record = json.loads(RECORD.read_text())
    own = len(healthy_models.OWN) + len(healthy_models.LAB)
    assert record["models"] == own + len(record["hosted"]) >= 25
    with capsys.disabled():
        print(f"\n{record['models']} healthy models: {record['errors']} errors, {record['warnings']} warnings")
    assert record["errors"] == 0
