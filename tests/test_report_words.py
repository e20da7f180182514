"""The answer in words: every case has its sentence, the unwelcome ones too."""

from __future__ import annotations

import pytest

import synthetic_runs as synthetic
from normkit.lab.analyse import analyse
from normkit.report import numbers
from normkit.report.details import details
from normkit.report.labels import is_plain, label
from normkit.report.words import verdict
from synthetic_runs import Script

SIX = (90, 95, 100, 105, 110, 115)


def times(factor: float) -> list[int | None]:
    return [round(factor * steps) for steps in SIX]


@pytest.fixture
def say(tmp_path):
    """Arms -> (summary, answer)."""

    def answer(**scripts: Script):
        changes = scripts.pop("changes", {})
        summary = analyse(synthetic.directory(tmp_path, scripts, **changes))
        return summary, verdict(summary)

    return answer


NEVER = [None] * 6
DIVERGED = ["diverged"] * 6
FAILED = ["failed"] * 6

CASES = {
    "faster": (
        {"none": Script(times(8), ms=0.5), "batch": Script(times(1), ms=1.0)},
        "Batch norm reaches 95 % in 8.0× fewer steps [8.0, 8.0] and 4.0× less time [4.0, 4.0] than no normalization.",
    ),
    "several arms": (
        {"none": Script(times(8)), "batch": Script(times(1)), "layer": Script(times(2))},
        "Batch norm reaches 95 % in 8.0× fewer steps [8.0, 8.0] and 8.0× less time [8.0, 8.0] than no normalization; "
        "layer norm in 4.0× fewer steps [4.0, 4.0] and 4.0× less time [4.0, 4.0].",
    ),
    "slower": (
        {"none": Script(times(1)), "batch": Script(times(2), ms=1)},
        "Batch norm reaches 95 % in 2.0× more steps [2.0, 2.0] and 4.0× more time [4.0, 4.0] than no normalization. "
        "Normalization hurts here: every arm with it needs more steps or does not arrive.",
    ),
    "fewer steps, more time": (
        {"none": Script(times(2), ms=0.1), "batch": Script(times(1), ms=1)},
        "Batch norm reaches 95 % in 2.0× fewer steps [2.0, 2.0] but 5.0× more time [5.0, 5.0] than no normalization. "
        "Normalization saves steps here but costs time.",
    ),
    "fewer steps, same time": (
        {"none": Script(times(2), ms=0.5), "batch": Script(times(1), ms=1.0)},
        "Batch norm reaches 95 % in 2.0× fewer steps [2.0, 2.0] than no normalization, in time not distinguishable "
        "(speed-up 1.00× [1.00, 1.00]). Normalization saves steps here, but no saving of time shows.",
    ),
    "not distinguishable": (
        {"none": Script([90, 110, 100, 95, 105, 100]), "batch": Script([110, 90, 100, 105, 95, 100])},
        "Batch norm is not distinguishable from no normalization in steps (speed-up 1.00× [0.82, 1.22]) or time "
        "(speed-up 1.00× [0.82, 1.22]). No speed-up by normalization shows here.",
    ),
    "same steps, more time": (
        {"none": Script([90, 110, 100, 95, 105, 100]), "batch": Script([110, 90, 100, 105, 95, 100], ms=2)},
        "Batch norm is not distinguishable from no normalization in steps (speed-up 1.00× [0.82, 1.22]) and takes "
        "4.0× more time [3.3, 4.9]. No speed-up by normalization shows here.",
    ),
    "baseline never arrives": (
        {"none": Script(NEVER), "batch": Script([50] * 6)},
        "Batch norm reaches 95 % in more than 40× fewer steps [40, ∞] and more than 40× less time [40, ∞] than no "
        "normalization. With no normalization none of 6 runs reaches it within 2000 steps.",
    ),
    "baseline sometimes arrives": (
        {"none": Script([500] * 5 + [None]), "batch": Script([50] * 6)},
        "Batch norm reaches 95 % in 10× fewer steps [10, ∞] and 10× less time [10, ∞] than no normalization. "
        "With no normalization 5 of 6 runs reach it within 2000 steps.",
    ),
    "baseline diverges": (
        {"none": Script(NEVER, states=DIVERGED), "batch": Script([50] * 6)},
        "Batch norm reaches 95 % in more than 40× fewer steps [40, ∞] and more than 40× less time [40, ∞] than no "
        "normalization. With no normalization all 6 runs diverge.",
    ),
    "arm never arrives": (
        {"none": Script(times(1)), "batch": Script(NEVER)},
        "With batch norm none of 6 runs reaches 95 %. Normalization hurts here: every arm with it needs more steps or "
        "does not arrive.",
    ),
    "arm rarely arrives": (
        {
            "none": Script(times(1)),
            "batch": Script([None, None, None, None, 100, 100], states=["diverged"] + ["done"] * 5),
        },
        "With batch norm only 2 of 6 runs reach 95 % (1 diverged). Normalization hurts here: every arm with it needs "
        "more steps or does not arrive.",
    ),
    "arm mostly arrives": (
        {"none": Script([400] * 6), "batch": Script([100] * 5 + [None])},
        "Batch norm is not distinguishable from no normalization in steps (speed-up 4.0× [0, 4.0]) or time "
        "(speed-up 4.0× [0, 4.0]) (it arrives in 5 of 6 runs). No speed-up by normalization shows here.",
    ),
    "arm diverges": (
        {"none": Script(times(1)), "batch": Script(NEVER, states=DIVERGED)},
        "With batch norm all 6 runs diverge. Normalization hurts here: every arm with it needs more steps or does not "
        "arrive.",
    ),
    "neither arrives": (
        {"none": Script(NEVER), "batch": Script(NEVER)},
        "With batch norm none of 6 runs reaches 95 %. With no normalization none of 6 runs reaches it within 2000 "
        "steps. No speed-up by normalization shows here.",
    ),
    "arm crashes": (
        {"none": Script(times(1)), "batch": Script(NEVER, states=FAILED)},
        "Batch norm cannot be compared: none of its runs has finished (6 failed).",
    ),
    "baseline crashes": (
        {"none": Script(NEVER, states=FAILED), "batch": Script(times(1))},
        "Batch norm cannot be compared: none of the baseline's runs has finished (6 failed).",
    ),
    "one seed": (
        {"none": Script([500]), "batch": Script([50])},
        "Batch norm reaches 95 % in 10× fewer steps (one seed, no interval) and 10× less time (one seed, no interval) "
        "than no normalization.",
    ),
    "one arm": (
        {"batch": Script([50, 60, 70])},
        "Batch norm reaches 95 % in 60 steps (median of 3 runs); there is no second arm to compare it with.",
    ),
    "composed arms": (
        {"none+adamw": Script(times(2)), "batch+adamw+dropout:0.2": Script(times(1))},
        "Batch norm with AdamW and dropout 0.2 reaches 95 % in 2.0× fewer steps [2.0, 2.0] and 2.0× less time "
        "[2.0, 2.0] than no normalization with AdamW.",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_case_has_its_words(case, say):
    scripts, expected = CASES[case]
    assert say(**scripts)[1] == expected


def with_adamw(say, plain: float, normed: float) -> str:
    """SGD: batch norm is 6 times faster; AdamW without and with it takes so many times SIX."""
    arms = {"none": Script(times(6)), "batch": Script(times(1))}
    return say(**arms, **{"none+adamw": Script(times(plain)), "batch+adamw": Script(times(normed))})[1]


def test_what_a_norm_adds_to_adamw_is_said_against_adamw_and_that_most_is_gone(say):
    assert with_adamw(say, plain=2, normed=1).endswith(
        "batch norm with AdamW in 6.0× fewer steps [6.0, 6.0] and 6.0× less time [6.0, 6.0]. Like for like, batch norm "
        "with AdamW reaches 95 % in 2.0× fewer steps [2.0, 2.0] and 2.0× less time [2.0, 2.0] than no normalization "
        "with AdamW, most of the advantage is gone."
    )


def test_an_advantage_that_is_gone_in_time_only_is_said_so(say):
    arms = {"none": Script(times(6)), "batch": Script(times(1)), "none+adamw": Script(times(5), ms=0.1)}
    answer = say(**arms, **{"batch+adamw": Script(times(1))})[1]
    assert "5.0× fewer steps [5.0, 5.0] than no normalization with AdamW, in time not distinguishable" in answer
    assert answer.endswith("most of the advantage in time is gone.")


def test_an_advantage_that_stays_is_not_said_to_be_gone(say):
    answer = with_adamw(say, plain=5, normed=1)
    assert "Like for like, batch norm with AdamW reaches 95 % in 5.0× fewer steps" in answer
    assert "gone" not in answer


def test_no_advantage_at_all_is_mostly_gone_too(say):
    assert with_adamw(say, plain=1, normed=1).endswith(
        "Like for like, batch norm with AdamW is not distinguishable from no normalization with AdamW in steps "
        "(speed-up 1.00× [1.00, 1.00]) or time (speed-up 1.00× [1.00, 1.00]), most of the advantage is gone."
    )


def test_quick_says_first_that_it_is_no_evidence(say):
    scripts = {"none": Script(times(8)), "batch": Script(times(1))}
    _, answer = say(**scripts, changes={"budget": "quick"})
    assert answer.startswith("quick look, not evidence: batch norm reaches 95 % in 8.0× fewer steps")


def test_lower_is_better_has_its_unit(say):
    about = {"name": "loss", "higher_is_better": False, "unit": "bits per character"}
    none, rms = Script(times(2), test=[2.5] * 6), Script(times(1), test=[2.4] * 6)
    summary, answer = say(none=none, rms=rms, changes={"metric": about, "target": 2.5})
    assert answer.startswith("RMS norm reaches 2.5 bits per character in 2.0× fewer steps")
    assert any("RMS norm 2.400 [2.400, 2.400] (−0.100 [−0.100, −0.100])" in text for text in details(summary))


def test_unfinished_directory_says_so(tmp_path):
    path = synthetic.directory(tmp_path, {"none": Script(times(8)), "batch": Script(times(1))})
    cell = next((path / "cells").glob("batch-final-*"))
    (cell / "status.json").write_text('{"state": "pending"}')
    assert verdict(analyse(path)).startswith("unfinished, 1 of 12 final runs are still to come: batch norm reaches")
    for cell in (path / "cells").glob("*-final-*"):
        (cell / "status.json").write_text('{"state": "pending"}')
    assert "no final run has finished yet, so there is no answer" in verdict(analyse(path))


def test_details_name_bounds_losses_and_few_seeds(say):
    none = Script([100, 110, 120], lr=10.0, bound_hit="high")
    batch = Script([100, None, 90], states=["done", "diverged", "done"])
    text = " ".join(details(say(none=none, batch=batch)[0]))
    assert "3 seeds: the intervals are the range over the seeds and hold the true median in about 75 %" in text
    assert "edge of the extended grid for no normalization (rate 10, the highest tried)" in text
    assert "Final runs lost: batch norm: 1 diverged of 3." in text


def test_details_name_the_environments_the_runs_come_from(say):
    began = {"torch": "2.13.0", "cores": 2}
    later = {"environment": began, "continued_in": [began | {"torch": "2.14.0"}]}
    arms = {"none": Script(times(8)), "batch": Script(times(1))}
    text = " ".join(details(say(**arms, changes=later)[0]))
    assert "The runs come from 2 environments, which differ in torch." in text
    assert "environments" not in " ".join(details(say(**arms)[0]))


def test_details_tell_the_cost_of_a_step(say):
    fields = {"norm_share": 0.4}
    summary, _ = say(none=Script(times(8), ms=0.4), batch=Script(times(1), ms=0.6, fields=fields))
    assert (
        "A step takes 0.400 ms with no normalization and 1.50× as long with batch norm, 40 % of it in norms."
        in details(summary)
    )


def sweep_answer(tmp_path, rows) -> str:
    return verdict(analyse(synthetic.sweep(tmp_path, "batch-size", rows)))


def test_sweep_says_where_it_helps_and_where_it_hurts(tmp_path):
    none = Script([100, 110, 120, 130, 140, 150])
    rows = {
        2: {"none": none, "batch": Script(NEVER)},
        4: {"none": none, "batch": Script([200, 220, 240, 260, 280, 300])},
        8: {"none": none, "batch": none},
        16: {"none": none, "batch": Script([50, 55, 60, 65, 70, 75])},
        32: {"none": none, "batch": Script([25, 27, 30, 32, 35, 38])},
    }
    assert sweep_answer(tmp_path, rows) == (
        "Batch norm against no normalization along batch size: 2.0× to 4.0× fewer steps at 16 and 32, 2.0× more steps "
        "at 4, not distinguishable at 8, reaches 95 % in half of the runs or fewer at 2; by the clock 2.0× to 4.0× "
        "less time at 16 and 32, 2.0× more time at 4, not distinguishable at 8."
    )


def test_sweep_of_one_seed_and_crashes(tmp_path):
    rows = {
        0.0: {"none": Script([100]), "batch": Script([50])},
        0.5: {"none": Script([None], states=["failed"]), "batch": Script([50])},
    }
    assert sweep_answer(tmp_path, rows) == (
        "Batch norm against no normalization along batch size: one seed only at 0 (speed-up 2.0×), no finished pair at "
        "0.5; by the clock one seed only at 0 (speed-up 2.0×)."
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none", "no normalization"),
        ("BatchNorm2d", "batch norm"),
        ("bn+momentum", "batch norm with momentum"),
        ("group:8", "group norm (8 groups)"),
        ("batch+placement:after", "batch norm after the activation"),
        (
            "batch+dropout:0.5+placement:after+init:0.1",
            "batch norm after the activation with dropout 0.5 and initial gain 0.1",
        ),
        ("batch:ghost:4", "ghost batch norm (4)"),
        ("batch:renorm:3:5:50+running:0.02", "batch renorm (3, 5, 50) with running share 0.02"),
        ("batch:moving_average", "moving-average batch norm"),
        ("batch:synchronized+processes:2", "synchronised batch norm over 2 processes"),
        ("batch:nonsense:4", "batch:nonsense:4"),
        ("my own", "my own"),
        ("batch+something", "batch+something"),
    ],
)
def test_labels(name, words):
    assert label(name) == words


def test_plain_arms():
    assert is_plain({"name": "none+adamw", "norm": "none"})
    assert is_plain({"name": "identity"})
    assert not is_plain({"name": "batch", "norm": "batch"})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (9.84, "9.8"),
        (17.6, "18"),
        (250.2, "250"),
        (1.07, "1.07"),
        (1.004, "1.004"),
        (0.996, "0.996"),
        (1, "1.00"),
        (0.5, "0.50"),
    ],
)
def test_a_factor_never_reads_as_one_unless_it_is(value, text):
    assert numbers.factor(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0"), (0.04134, "0.0413"), (1278.4, "1278"), (-3.14159, "−3.14"), (72.5, "72.5")],
)
def test_significant_digits(value, text):
    assert numbers.significant(value) == text
