"""Policies by name: in a layer, in `create`, in an arm of a comparison."""

from __future__ import annotations

import pytest

import normkit as nk
from normkit.lab.arm import parse_arms
from normkit.statistics import naming


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("ghost:16", nk.statistics.Ghost(16)),
        ("GHOST:16", nk.statistics.Ghost(16)),
        ("renorm:2.5:4:100", nk.statistics.Renorm(2.5, 4, 100)),
        ("moving-average", nk.statistics.MovingAverage()),
        ("batch:running", nk.statistics.Batch("running")),
        ("l1", nk.statistics.L1()),
    ],
)
def test_a_name_is_the_policy_wherever_it_is_typed(text, policy):
    assert nk.statistics.named(text) == policy
    assert nk.BatchNorm1d(4, statistics=text).statistics == policy
    assert nk.create(f"batch:{text}", 4, dim=1).statistics == policy
    (arm,) = parse_arms(f"batch:{text}+adamw")
    assert arm.norm == f"batch:{text}"


def test_every_policy_of_the_menu_has_a_name():
    names = {"batch", "blend", "ghost", "l1", "moving_average", "per_domain", "per_step", "range", "renorm", "running"}
    assert set(naming.policies()) == names | {"synchronized", "taper", "virtual"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gost:16", "did you mean 'ghost'"),
        ("ghost", r"Ghost takes \(size\)"),
        ("ghost:16:3", r"Ghost takes \(size\)"),
        ("ghost:0", "Ghost: size=0"),
    ],
)
def test_a_wrong_name_says_what_there_is(text, message):
    with pytest.raises(ValueError, match=message):
        nk.BatchNorm1d(4, statistics=text)
