"""Run directory -> summary: intervals with known answers, censored runs, learning-rate ranges, unreadable files."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest

import synthetic_runs as synthetic
from normkit.lab.analyse import analyse, intervals
from normkit.lab.analyse.curves import thin
from normkit.lab.analyse.intervals import Finish, mean_interval, median_finish, paired_difference, paired_ratio
from normkit.lab.analyse.rates import stable_range, usable_range
from synthetic_runs import Script

BUDGET = 2000.0


def at(*steps: float | None, budget: float = BUDGET) -> list[Finish]:
    return [Finish(step, budget) for step in steps]


def arm(summary: dict, name: str, point: int = 0) -> dict:
    return next(arm for arm in summary["points"][point]["arms"] if arm["name"] == name)


@pytest.fixture
def few_resamples(monkeypatch):
    """Simulations repeat the interval hundreds of times; fewer resamples move its ends less than the seeds do."""
    monkeypatch.setattr(intervals, "RESAMPLES", 1500)
    intervals.resamples.cache_clear()
    yield
    intervals.resamples.cache_clear()


# --- intervals


def test_ratio_of_constant_pairs_is_exact():
    result = paired_ratio(at(*[600] * 6), at(*[60] * 6))
    assert (result["value"], result["low"], result["high"]) == (10.0, 10.0, 10.0)
    assert (result["bound"], result["verdict"]) == ("exact", "faster")


def test_ratio_is_paired():
    """Seeds differ tenfold, the ratio never: an unpaired interval would be wide, the paired one is a point."""
    difficulty = [10, 20, 40, 60, 80, 100]
    result = paired_ratio(at(*[3 * d for d in difficulty]), at(*difficulty))
    assert (result["value"], result["low"], result["high"]) == (3.0, 3.0, 3.0)


def test_ratio_of_the_swapped_arms_is_the_inverse():
    a, b = at(100, 130, 80, 210, 95, 60), at(300, 200, 260, 240, 500, 90)
    there, back = paired_ratio(a, b), paired_ratio(b, a)
    assert there["value"] == pytest.approx(1 / back["value"])
    assert there["low"] == pytest.approx(1 / back["high"], rel=0.02)  # the tails are cut at whole resamples


def test_even_number_of_pairs_takes_the_geometric_mean_of_the_middle_two():
    result = paired_ratio(at(100, 200, 800, 1600), at(100, 100, 100, 100))
    assert result["value"] == pytest.approx(4.0)  # of 2 and 8


def test_five_seeds_give_the_range_of_the_seeds():
    result = paired_ratio(at(200, 300, 400, 500, 600), at(*[100] * 5))
    assert (result["value"], result["low"], result["high"]) == (4.0, 2.0, 6.0)


def test_all_ties_are_not_distinguishable():
    result = paired_ratio(at(*[75] * 8), at(*[75] * 8))
    assert (result["value"], result["verdict"]) == (1.0, "not distinguishable")


def test_interval_that_touches_one_is_not_distinguishable():
    result = paired_ratio(at(100, 150, 160, 170, 180), at(*[100] * 5))
    assert result["low"] == 1.0
    assert result["verdict"] == "not distinguishable"


def test_slower_arm():
    result = paired_ratio(at(100, 110, 120, 130, 140, 150), at(200, 230, 250, 280, 290, 330))
    assert result["high"] < 1
    assert result["verdict"] == "slower"


def test_one_seed_has_a_ratio_and_no_interval():
    result = paired_ratio(at(500), at(50))
    assert (result["value"], result["low"], result["high"], result["verdict"]) == (10.0, None, None, "one seed")


def test_no_pairs():
    assert paired_ratio([], [])["verdict"] == "no pairs"


def test_baseline_that_never_arrives_gives_a_lower_bound():
    result = paired_ratio(at(*[None] * 6), at(100, 100, 200, 200, 200, 400))
    assert (result["value"], result["bound"]) == (BUDGET / 200, "at least")
    assert result["high"] is None
    assert result["low"] >= BUDGET / 400
    assert (result["verdict"], result["baseline_reached"]) == ("faster", 0)


def test_few_censored_baselines_keep_the_median_exact_and_open_the_interval():
    result = paired_ratio(at(500, 500, 500, 500, None, None, 500, 500), at(*[100] * 8))
    assert (result["value"], result["bound"]) == (5.0, "exact")
    assert (result["low"], result["high"]) == (5.0, None)


def test_censored_baseline_is_not_dropped():
    """Dropping the two seeds that never arrive would make the arm look slower than it is."""
    kept = paired_ratio(at(100, 100, 200, None, None), at(*[100] * 5))
    dropped = paired_ratio(at(100, 100, 200), at(*[100] * 3))
    assert (kept["value"], dropped["value"]) == (2.0, 1.0)


def test_arm_that_mostly_misses_gets_no_ratio():
    result = paired_ratio(at(*[100] * 6), at(50, 50, 50, None, None, None))
    assert (result["value"], result["verdict"], result["arm_reached"]) == (None, "rarely reached", 3)


def test_arm_that_sometimes_misses_has_a_low_end_of_nothing():
    result = paired_ratio(at(*[100] * 6), at(50, 50, 50, 50, None, None))
    assert result["value"] == 2.0
    assert result["low"] <= 100 / BUDGET
    assert result["verdict"] == "not distinguishable"


def test_bound_is_the_one_nearest_to_no_effect():
    """Lower bounds say 3, upper bounds say 4: the report must not claim the 4."""
    result = paired_ratio(at(300, 400, None), at(100, 100, BUDGET / 2.5))
    assert (result["value"], result["bound"]) == (3.0, "at least")


def test_neither_arrives():
    result = paired_ratio(at(None, None, None), at(None, None, None))
    assert (result["value"], result["verdict"]) == (None, "rarely reached")


def test_median_time_counts_censored_runs_as_later_than_all_others():
    assert median_finish(at(10, 20, 30, None, None))["median"] == 30
    race = median_finish(at(10, 20, None, None, None))
    assert (race["median"], race["high"], race["reached"], race["of"]) == (None, None, 2, 5)


def test_interval_agrees_with_scipy():
    from scipy.stats import bootstrap

    x = np.random.default_rng(3).normal(5, 2, size=12)
    mean, low, high = mean_interval(list(x))
    level = 1 - 2 * intervals.tail(12)
    theirs = bootstrap((x,), np.mean, confidence_level=level, method="percentile", n_resamples=20_000, rng=1)
    assert mean == pytest.approx(x.mean())
    assert low == pytest.approx(theirs.confidence_interval.low, abs=0.1)
    assert high == pytest.approx(theirs.confidence_interval.high, abs=0.1)


def test_expanded_tail_is_hesterbergs():
    """Hesterberg 2015, section 3.3: n = 10 widens the tail of 2.5 % to about 0.85 %, a large n hardly."""
    assert intervals.tail(10) == pytest.approx(0.0085, abs=0.0003)
    assert intervals.tail(10_000) == pytest.approx(0.025, abs=0.0001)


def coverage(draw, interval, truth: float, repeats: int = 800) -> float:
    rng = np.random.default_rng(11)
    hits = 0
    for _ in range(repeats):
        low, high = interval(draw(rng))
        hits += (low is None or low <= truth) and (high is None or truth <= high)
    return hits / repeats


@pytest.mark.parametrize("seeds", [5, 7, 10])
def test_interval_of_the_median_ratio_covers(seeds, few_resamples):
    def interval(pairs):
        result = paired_ratio(at(*pairs[0]), at(*pairs[1]))
        return result["low"], result["high"]

    def draw(rng):
        shared = rng.lognormal(0, 0.5, seeds)
        return 400 * shared * rng.lognormal(0, 0.3, seeds), 100 * shared * rng.lognormal(0, 0.3, seeds)

    assert 0.91 <= coverage(draw, interval, truth=4.0) <= 0.995  # five seeds: 1 - 2 ** -4 at the very most


def test_interval_covers_with_censored_baselines(few_resamples):
    """A budget that about a third of the baseline runs exceed must not pull the interval below the truth."""

    def interval(pairs):
        baseline = [Finish(b if b < 550 else None, 550) for b in pairs[0]]
        result = paired_ratio(baseline, at(*pairs[1]))
        return result["low"], result["high"]

    def draw(rng):
        return 400 * rng.lognormal(0, 0.6, 10), 100 * rng.lognormal(0, 0.2, 10)

    assert 0.91 <= coverage(draw, interval, truth=4.0) <= 0.999


def test_expanded_interval_of_the_mean_beats_the_plain_percentile(few_resamples, monkeypatch):
    def draw(rng):
        return list(rng.normal(0.95, 0.01, 5))

    def interval(x):
        return mean_interval(x)[1:]

    expanded = coverage(draw, interval, truth=0.95)
    monkeypatch.setattr(intervals, "tail", lambda n: 0.025)
    plain = coverage(draw, interval, truth=0.95)
    assert plain < 0.88 < expanded


def test_difference_knows_the_better_direction():
    higher = paired_difference([0.90] * 6, [0.95] * 6, higher_is_better=True)
    lower = paired_difference([2.4] * 6, [2.5] * 6, higher_is_better=False)
    assert (higher["verdict"], lower["verdict"]) == ("better", "worse")
    assert higher["value"] == pytest.approx(0.05)
    assert paired_difference([0.9, 0.95, 0.92, 0.9, 0.93], [0.91, 0.94, 0.92, 0.91, 0.92], True)["verdict"] == (
        "not distinguishable"
    )


# --- learning rates and curves


def rates(*reached: int, diverged: tuple[int, ...] = ()) -> list[dict]:
    grid = [10.0**k for k in range(-3, len(reached) - 3)]
    return [
        {"lr": lr, "seeds": 3, "reached": r, "diverged": 3 if k in diverged else 0, "failed": 0}
        for k, (lr, r) in enumerate(zip(grid, reached, strict=True))
    ]


def test_usable_range_is_the_widest_stretch_of_rates_at_which_most_arrive():
    stretch = usable_range(rates(0, 3, 1, 2, 3, 3, 0))
    assert (stretch["low"], stretch["high"], stretch["rates"]) == (1.0, 100.0, 3)
    assert stretch["decades"] == pytest.approx(2.0)
    assert (stretch["open_low"], stretch["open_high"]) == (False, False)


def test_usable_range_says_when_the_grid_ended_first():
    stretch = usable_range(rates(0, 0, 2, 3))
    assert (stretch["open_low"], stretch["open_high"]) == (False, True)
    assert usable_range(rates(0, 1, 1)) is None
    assert usable_range([]) is None


def test_stable_range_ignores_the_target():
    assert stable_range(rates(0, 0, 0, 0, diverged=(3,)))["high"] == 0.1


@pytest.mark.parametrize("length", [3, 500, 501, 5000])
def test_thinned_curve_keeps_its_ends_and_its_early_steps(length):
    steps = list(range(5, 5 * length + 1, 5))
    kept = thin(steps, 500)
    assert len(kept) <= 500
    assert (kept[0], kept[-1]) == (steps[0], steps[-1])
    assert kept[:20] == steps[:20]
    assert kept == sorted(set(kept))


# --- a whole directory


@pytest.fixture
def digits(tmp_path):
    none = Script([1000, 1200, None, 1100, 1300, 900], test=[0.93] * 6, lr=3.0, usable=(1, 3), ms=0.4)
    none.states = ["done"] * 5 + ["diverged"]
    none.steps[5] = None
    batch = Script([100, 80, 90, 110, 100, 70], test=[0.97] * 6, lr=1.0, usable=(0.03, 10), diverges_above=99)
    rms = Script([None] * 5 + [1900], states=["done", "failed", "done", "done", "done", "done"])
    return synthetic.directory(tmp_path / "digits", {"none": none, "batch": batch, "rms": rms})


def test_summary_counts_every_run(digits):
    summary = analyse(digits)
    assert arm(summary, "none")["runs"] == {
        "planned": 6,
        "finished": 6,
        "reached": 4,
        "censored": 2,
        "diverged": 1,
        "failed": 0,
        "unfinished": 0,
    }
    rms = arm(summary, "rms")
    assert (rms["runs"]["failed"], rms["runs"]["finished"], rms["runs"]["reached"]) == (1, 5, 1)
    assert rms["steps_ratio"]["verdict"] == "rarely reached"
    assert len(summary["runs"]) == 3 * (7 * 3 + 6)


def test_summary_has_the_known_answer(digits):
    batch = arm(analyse(digits), "batch")
    assert batch["steps_to_target"]["median"] == 95
    # ratios by seed: 10, 15, more than 22, 10, 13, more than 28
    assert batch["steps_ratio"]["value"] == pytest.approx(math.sqrt(13 * 15), rel=1e-6)
    assert batch["steps_ratio"]["bound"] == "exact"
    assert batch["seconds_ratio"]["value"] == pytest.approx(math.sqrt(13 * 15) * 0.4 / 0.5, rel=1e-6)
    assert batch["test_difference"]["value"] == pytest.approx(0.04)
    assert batch["test_difference"]["pairs"] == 5  # the diverged run has no test value
    assert (batch["usable_rates"]["low"], batch["usable_rates"]["high"]) == (0.03, 10)
    assert batch["usable_rates"]["open_high"]
    assert (batch["lr"], batch["parameters"]) == (1.0, 27710)


def test_seconds_budget_of_a_diverged_run_is_that_of_all_its_steps(tmp_path):
    """It stopped after 40 steps; that is no proof that it would have arrived right afterwards."""
    none = Script([None] * 6, states=["diverged"] * 6, ms=0.5)
    path = synthetic.directory(tmp_path, {"none": none, "batch": Script([100] * 6, ms=0.5)})
    ratio = arm(analyse(path), "batch")["seconds_ratio"]
    assert (ratio["value"], ratio["bound"]) == (pytest.approx(2000 / 100), "at least")


def test_summary_is_strict_json_on_disk_and_the_same_every_time(digits):
    first = analyse(digits)
    text = (digits / "summary.json").read_text()

    def refuse(word):
        raise AssertionError(word)

    assert json.loads(text, parse_constant=refuse) == first
    analyse(digits)
    assert (digits / "summary.json").read_text() == text


def test_sweep_has_one_point_per_value(tmp_path):
    row = {"none": Script([400] * 5), "batch": Script([100] * 5)}
    rows = {2: row, 8.0: {"none": Script([400] * 5), "batch": Script([None] * 5)}}
    summary = analyse(synthetic.sweep(tmp_path, "batch-size", rows))
    assert [point["knob"] for point in summary["points"]] == [2, 8.0]
    assert arm(summary, "batch", 0)["steps_ratio"]["value"] == 4.0
    assert arm(summary, "batch", 1)["steps_ratio"]["verdict"] == "rarely reached"
    assert arm(summary, "batch", 1)["lr"] == 0.3


def test_an_arm_is_also_compared_with_its_own_network_without_a_norm(tmp_path):
    arms = {"none": [600] * 6, "batch": [100] * 6, "none+adamw": [150] * 6, "batch+adamw": [100] * 6}
    summary = analyse(synthetic.directory(tmp_path, {name: Script(steps) for name, steps in arms.items()}))
    assert [one["name"] for one in summary["points"][0]["arms"] if "like_for_like" in one] == ["batch+adamw"]
    batch = arm(summary, "batch+adamw")
    assert batch["steps_ratio"]["value"] == 6.0
    assert batch["like_for_like"]["against"] == "none+adamw"
    assert batch["like_for_like"]["steps_ratio"]["value"] == 1.5
    assert batch["like_for_like"]["test_difference"]["pairs"] == 6


def test_an_arm_whose_search_crashed_at_every_rate_has_failed_and_is_not_still_to_come(tmp_path):
    path = synthetic.directory(tmp_path, {"none": Script([600] * 6), "batch": Script([100] * 6)})
    for cell in (path / "cells").glob("batch-final-*"):
        shutil.rmtree(cell)
    content = json.loads((path / "experiment.json").read_text())
    del content["chosen"]["batch"]
    (path / "experiment.json").write_text(json.dumps(content))
    assert arm(analyse(path), "batch")["runs"]["unfinished"] == 6  # the search may still be going on
    content["rates"]["searched"] = {"": content["rates"]["grid"]}
    (path / "experiment.json").write_text(json.dumps(content))
    runs = arm(analyse(path), "batch")["runs"]
    assert (runs["failed"], runs["unfinished"], runs["finished"]) == (6, 0, 0)


def test_divergence_ends_the_curve_at_the_last_finite_value(digits):
    none = arm(analyse(digits), "none")
    assert [(end["seed"], end["step"]) for end in none["divergences"]] == [(5, 40)]
    assert max(none["curve"]["runs"]) == 6
    assert none["curve"]["runs"][-1] == 5


# --- directories that are not as they should be


def test_unfinished_directory_is_analysed(digits):
    for cell in sorted((digits / "cells").glob("batch-final-*"))[:2]:
        (cell / "status.json").write_text('{"state": "running", "attempts": 1}')
    shutil_target = sorted((digits / "cells").glob("batch-final-*"))[2]
    for file in shutil_target.iterdir():
        file.unlink()
    shutil_target.rmdir()
    batch = arm(analyse(digits), "batch")
    assert (batch["runs"]["finished"], batch["runs"]["unfinished"]) == (3, 3)
    assert batch["steps_ratio"]["pairs"] == 3


def test_torn_last_line_is_dropped_and_extra_files_are_ignored(digits):
    before = analyse(digits)
    cell = next((digits / "cells").glob("batch-final-*"))
    with open(cell / "metrics.jsonl", "a") as file:
        file.write('{"step": 2005, "valid')
    (digits / "notes.txt").write_text("mine")
    (digits / "cells" / "README").write_text("mine")
    (digits / "cells" / "empty").mkdir()
    assert analyse(digits) == before


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("status.json", '{"state": "do', "status.json: not a JSON document"),
        ("status.json", '{"state": "finished"}', "'finished' is none of pending"),
        ("config.json", '{"lr": 1}', "config.json lacks arm, seed, phase, steps"),
        ("metrics.jsonl", '{"step": 5}\n{"st\n{"step": 15}\n', "metrics.jsonl, line 2"),
    ],
)
def test_unreadable_cell_is_left_out_and_named(digits, file, content, words):
    cell = next((digits / "cells").glob("batch-final-*"))
    (cell / file).write_text(content)
    summary = analyse(digits)
    (problem,) = summary["problems"]
    assert problem["file"] == f"cells/{cell.name}"
    assert words in problem["problem"]
    assert arm(summary, "batch")["runs"]["unfinished"] == 1


def test_cell_without_status_is_named(digits):
    cell = next((digits / "cells").glob("batch-final-*"))
    (cell / "status.json").unlink()
    (problem,) = analyse(digits)["problems"]
    assert "status.json is missing" in problem["problem"]


def test_directories_that_are_no_experiment(tmp_path, digits):
    with pytest.raises(ValueError, match="no such directory"):
        analyse(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no experiment\.json"):
        analyse(tmp_path)
    file = digits / "experiment.json"
    whole = json.loads(file.read_text())
    for change, words in [
        ({"schema": 9}, "schema 9"),
        ({"baseline": "bn"}, "baseline 'bn' is none of the arms none, batch, rms"),
    ]:
        file.write_text(json.dumps(whole | change))
        with pytest.raises(ValueError, match=words):
            analyse(digits)
    del whole["metric"], whole["target"]
    file.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="keys metric, target are missing"):
        analyse(digits)
    file.write_text('{"schema": 1, "arms"')
    with pytest.raises(ValueError, match="not a JSON document"):
        analyse(digits)
