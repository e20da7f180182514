"""Strategies by themselves: recorded readings in, prescriptions out. Nothing is trained here."""

from __future__ import annotations

import json
import math

import pytest
from torch import nn

import normkit as nk
from normkit import strategies
from normkit.strategies import (
    Freeze,
    GhostRamp,
    Handover,
    Measured,
    Moment,
    Plateau,
    Recalibrate,
    RenormRamp,
    Select,
    Taper,
)
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.reading import Reading

MODEL = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8))


def replay(strategy, readings=(), total=100, per_epoch=10):
    """Step by step through a run: the step, and what was prescribed at it. The state survives a file at every step."""
    state, found = strategy.init(MODEL), []
    for step in range(1, total + 1):
        state = json.loads(json.dumps(state))
        seen = Evidence([r for r in readings if (r.step or 0) <= step])
        prescriptions = strategy.update(state, Moment(step, total, per_epoch), seen)
        found += [(step, p.operation, dict(p.options), p.module) for p in prescriptions]
    return found


@pytest.mark.parametrize(("at", "step"), [("25%", 25), (40, 40), ("3ep", 30), ("0%", 1)])
def test_freeze_acts_once_when_it_is_time(at, step):
    assert replay(Freeze(at)) == [(step, "freeze_", {"statistics": True, "affine": False}, "")]


def test_handover_is_for_all_norms_or_for_those_that_are_named():
    assert replay(Handover("50%", "group:4")) == [(50, "convert_", {"to": "group:4"}, "")]
    named = replay(Handover(7, "layer", modules=("1", "3")))
    assert named == [(7, "convert_", {"to": "layer"}, "1"), (7, "convert_", {"to": "layer"}, "3")]
    with pytest.raises(ValueError, match="no module '9'"):
        Handover(7, "layer", modules=("9",)).init(MODEL)
    with pytest.raises(ValueError, match="grup"):
        Handover("50%", "grup:4")


def test_taper_closes_its_gate_by_a_half_cosine_and_freezes():
    found = replay(Taper(start="20%", end="60%", increments=10))
    assert [step for step, *_ in found] == list(range(20, 61, 4))
    gates = [float(options["statistics"].split(":")[1]) for _, operation, options, _ in found[:-1]]
    assert gates == pytest.approx([(1 + math.cos(math.pi * k / 10)) / 2 for k in range(10)], abs=1e-5)
    assert found[-1][1:3] == ("freeze_", {"statistics": True, "affine": False})


def test_the_bounds_of_renorm_open_linearly():
    found = replay(RenormRamp(start=10, end=20, r_max=3, d_max=5, increments=2))
    assert [(step, options["statistics"]) for step, _, options, _ in found] == [
        (10, "renorm:1.0:0.0:0"),
        (15, "renorm:2.0:2.5:0"),
        (20, "renorm:3.0:5.0:0"),
    ]


@pytest.mark.parametrize(("sizes", "expected"), [((4, 64), [4, 8, 16, 32, 64]), ((64, 4), [64, 32, 16, 8, 4])])
def test_the_ghost_batch_changes_by_equal_factors(sizes, expected):
    found = replay(GhostRamp(start="0%", end="80%", sizes=sizes, increments=4))
    assert [int(options["statistics"].split(":")[1]) for _, _, options, _ in found] == expected


def test_recalibrate_comes_again_and_again():
    found = replay(Recalibrate(30, steps=5))
    assert [(step, operation, options) for step, operation, options, _ in found] == [
        (step, "calibrate_", {"steps": 5}) for step in (30, 60, 90)
    ]


def test_select_settles_each_layer_once_and_the_rest_in_the_end():
    def readings(step, shares):
        for name, (kind, share) in shares.items():
            yield Reading("switchable_choice", kind, name, step)
            yield Reading("switchable_share", share, name, step)

    recorded = [
        *readings(10, {"1": ("batch", 0.5), "3": ("layer", 0.6)}),
        *readings(20, {"1": ("batch", 0.9), "3": ("layer", 0.6)}),
        *readings(30, {"3": ("instance", 0.5)}),
    ]
    assert replay(Select("60%", share=0.8), recorded) == [
        (20, "convert_", {"to": "batch"}, "1"),
        (60, "convert_", {"to": "instance"}, "3"),
    ]


def test_a_measured_trigger_wants_the_worst_layer_to_hold_several_times_in_a_row():
    values = {
        10: (0.01, 0.2),
        20: (0.01, 0.04),
        30: (0.02, 0.03),
        40: (0.2, 0.03),
        50: (0.04,) * 2,
        60: (0.04,) * 2,
        70: (0.04,) * 2,
    }
    recorded = [
        Reading("mean_drift", v, m, step) for step, pair in values.items() for m, v in zip("13", pair, strict=True)
    ]
    assert replay(Freeze(Measured("mean_drift", 0.05, times=3)), recorded)[0][0] == 70
    assert replay(Freeze("mean_drift<0.05"), recorded)[0][0] == 70
    assert replay(Freeze(Measured("mean_drift", 0.05, times=2)), recorded)[0][0] == 30
    assert replay(Freeze("mean_drift<0.001"), recorded) == []
    above = [Reading("gradient_noise", v, step=step) for step, v in ((10, 1.0), (20, 9.0), (30, 9.0), (40, 9.0))]
    assert replay(Freeze("gradient_noise>5"), above)[0][0] == 40


def test_a_plateau_is_a_loss_that_gets_no_better():
    losses = [Reading("loss", max(1.0, 3 - step / 20), step=step) for step in range(1, 101)]
    ((step, *_),) = replay(Freeze(Plateau(10)), losses)
    assert 50 <= step <= 60  # the loss stands still from step 40 on: twenty steps later it is certain
    assert replay(Freeze("plateau:10"), losses)[0][0] == step
    falling = [Reading("loss", 0.9**step, step=step) for step in range(1, 101)]
    assert replay(Freeze(Plateau(10)), falling) == []


def test_phases_wait_for_each_other():
    text = "batch -> frozen@10% lr/10 -> batch@30% -> group:8@50% rewarm:5"
    strategy = strategies.parse(text)
    assert [(step, operation) for step, operation, *_ in replay(strategy)] == [
        (10, "freeze_"),
        (30, "convert_"),
        (50, "convert_"),
    ]
    assert str(strategy) == "frozen@10% lr/10 -> batch@30% -> group:8@50% rewarm:5"
    assert strategies.parse(str(strategy)) == strategy
    late = strategies.parse("frozen@60% -> batch@20%")
    assert [step for step, *_ in replay(late)] == [60, 61]


def test_the_step_size_changes_with_the_phase_that_acted():
    strategy = strategies.parse("frozen@10% lr/10 -> taper@20-40% clip:0.02 -> batch@50%")
    state, coupled = strategy.init(MODEL), []
    for step in range(1, 101):
        if strategy.update(state, Moment(step, 100), Evidence([])):
            coupled.append((step, str(strategy.coupled(state))))
    assert coupled[0] == (10, "lr/10")
    assert {words for step, words in coupled if 20 <= step < 40} == {""}  # on the way nothing is cut
    assert coupled[-2:] == [(40, "clip:0.02"), (50, "")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("group:8", "does not say when; write group:8@50%"),
        ("frozen@soon", "'soon' says no time"),
        ("frozen@140%", "no point of training"),
        ("taper@50%", "a ramp runs between two points"),
        ("ghost@10-20%", "a ghost ramp has two sizes"),
        ("ghost:1-20@10-20%", "2 or more each"),
        ("frozen@5% lr*3", r"'lr\*3' does nothing to the step size"),
        ("frozen@5% -> ", "an empty phase"),
        ("grup:8@5%", "did you mean 'group"),
    ],
)
def test_text_that_cannot_be_read_says_what_is_wrong_and_how_it_is_written(text, message):
    with pytest.raises(ValueError, match=message) as raised:
        strategies.parse(text)
    assert "joined by ->" in str(raised.value)


def test_a_point_that_is_not_known_in_steps_names_the_argument():
    with pytest.raises(ValueError, match="total_steps="):
        Freeze("5%").update({"done": False}, Moment(1), Evidence([]))
    with pytest.raises(ValueError, match="steps_per_epoch="):
        Freeze("5ep").update({"done": False}, Moment(1, 100), Evidence([]))
    with pytest.raises(ValueError, match="ends at step 10, and starts at 20"):
        Taper(start="20%", end="10%").check(Moment(0, 100))


def test_the_menu_is_public():
    assert all(hasattr(strategies, name) for name in strategies.__all__)
    assert nk.strategies is strategies
