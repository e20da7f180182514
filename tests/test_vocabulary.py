"""The nouns that measuring, rules, strategies and surgery speak in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normkit as nk
from normkit.surgery.carry_out import carry_out
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding, worst_first
from normkit.vocabulary.prescription import Prescription
from normkit.vocabulary.quantity import Quantity
from normkit.vocabulary.reading import Reading


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))


def test_evidence_is_asked_by_place_by_quantity_and_over_steps():
    evidence = Evidence(
        [
            Reading("drift", 0.5, "bn1", 10),
            Reading("drift", 0.7, "bn1", 20),
            Reading("drift", 0.1, "bn2", 20),
            Reading("kind", "BatchNorm2d", "bn1"),
            Reading("readers", ("relu", "add"), "bn1"),
        ]
    )
    assert evidence.modules("drift") == ("bn1", "bn2")
    assert [reading.value for reading in evidence.series("drift", "bn1")] == [0.5, 0.7]
    assert evidence.number("drift", "bn1") == 0.7
    assert evidence.number("kind", "bn1") is None
    assert evidence.word("kind", "bn1") == "BatchNorm2d"
    assert evidence.names("readers", "bn1") == ("relu", "add")
    assert dict(evidence.numbers("drift")) == {"bn1": 0.7, "bn2": 0.1}
    assert evidence.latest("drift", "bn3") is None
    assert "kind" in evidence
    assert "loss" not in evidence
    assert evidence.quantities == {"drift", "kind", "readers"}


def test_findings_come_worst_first_and_in_order():
    findings = [Finding("a", "note", "x"), Finding("b", "error", "y"), Finding("c", "note", "z")]
    assert [finding.rule for finding in worst_first(findings)] == ["b", "a", "c"]


def test_words_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"severity 'bad' is unknown"):
        Finding("a", "bad", "x")
    with pytest.raises(ValueError, match=r"stage 'later' is unknown"):
        Quantity("a", "later", "", "")
    with pytest.raises(ValueError, match="by operation 'freeze_' or by hand"):
        Prescription("frozen", "bn", "because", operation="freeze_", by_hand="nk.freeze_(model)")


def test_a_prescription_says_what_to_type_and_typing_it_does_what_is_carried_out():
    prescription = Prescription(
        "becomes group norm", "1", "the batch is small", "retrain", operation="convert_", options=(("to", "group:4"),)
    )
    assert prescription.code == "nk.convert_(model, to='group:4', filter_fn=lambda module, name: name == '1')"
    typed, carried = model(), model()
    eval(prescription.code, {"nk": nk, "model": typed})
    (certificate,) = carry_out(carried, [prescription])
    assert [type(layer) for layer in typed] == [type(layer) for layer in carried]
    assert isinstance(carried[1], nk.GroupNorm)
    assert isinstance(carried[4], nn.BatchNorm2d)
    certificate.undo()
    assert type(carried[1]) is nn.BatchNorm2d


def test_one_operation_serves_all_modules_that_ask_for_the_same():
    both = [Prescription("frozen", name, "small batches", "train_identical", operation="freeze_") for name in "14"]
    network = model()
    certificates = carry_out(network, both)
    assert len(certificates) == 1
    assert {p.module for p in certificates[0].changed} == {"1", "4"}


def test_what_a_prescription_cannot_hold_is_given():
    batch = torch.randn(16, 3, 8, 8) * 3 + 5
    network = model()
    (certificate,) = carry_out(
        network,
        [Prescription("calibrated", "1", "stale", "train_identical", operation="calibrate_")],
        given={"loader": [batch], "optimizer": None, "nonsense": 1},
    )
    expected = network[0](batch).mean((0, 2, 3))
    torch.testing.assert_close(network[1].running_mean, expected)
    assert network[4].running_mean.abs().max() == 0
    assert certificate.changed


def test_when_the_second_operation_fails_the_first_is_taken_back():
    network = model()
    wanted = [
        Prescription("frozen", "1", "small batches", "train_identical", operation="freeze_"),
        Prescription("becomes nothing", "4", "a mistake", "retrain", operation="convert_", options=(("to", "grup"),)),
    ]
    with pytest.raises(ValueError, match="grup"):
        carry_out(network, wanted)
    assert type(network[1]) is nn.BatchNorm2d
    with pytest.raises(ValueError, match="has no operation"):
        carry_out(network, [wanted[0], Prescription("told", "1", "why", by_hand="x")])
    assert type(network[1]) is nn.BatchNorm2d
