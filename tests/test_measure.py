"""measure: the numbers are those of an obvious computation, and the model is what it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normkit as nk
from normkit.measure import QUANTITIES, measure


def by_place(readings):
    return {(reading.quantity, reading.module): reading.value for reading in readings}


def test_statistics_of_a_batch_norm_are_those_computed_by_hand():
    bn = nk.BatchNorm2d(3)
    bn.running_mean.copy_(torch.tensor([1.0, -2.0, 0.5]))
    bn.running_var.copy_(torch.tensor([4.0, 0.25, 1.0]))
    x = torch.randn(8, 3, 5, 5) * 3 + 7
    found = by_place(measure(nn.Sequential(bn), x))
    flat = x.double().movedim(1, 0).flatten(1)
    mean, var = flat.mean(1), flat.var(1)
    running = bn.running_mean.double(), bn.running_var.double()
    assert found["values_per_channel", "0"] == 200
    apart = (mean - running[0]).abs() / (running[1] + 1e-5).sqrt()
    assert found["mean_drift", "0"] == pytest.approx(float(apart.mean()))
    assert found["variance_drift", "0"] == pytest.approx(float((var / running[1]).log().abs().mean()), rel=1e-4)


def test_quantities_have_the_names_they_are_listed_under():
    assert all(name == quantity.name for name, quantity in QUANTITIES.items())
