"""Fairness on paper: the same grid, seeds and trials for every arm, and a choice of rate that is fixed in advance."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from normkit.lab import LabError
from normkit.lab.arm import parse_arms
from normkit.lab.comparison import make_recipe
from normkit.lab.experiment import ACCURACY, ADAM_RATES, MOMENTUM_RATES, SGD_RATES, Metric
from normkit.lab.knob import make_sweep
from normkit.lab.load import Source
from normkit.lab.recipe import BUDGETS, EXTENSIONS, LEAST_RATES, middle
from normkit.lab.search import best_rate, choose, extend
from small_experiments import tiny

BITS = Metric("bits", lambda o, t: 0.0, higher_is_better=False)


def recipe(budget="default", arms="none,batch,layer+adamw", sweep=None, experiment=None, **changes):
    experiment = experiment or tiny()
    return make_recipe(
        Source("tiny", tiny), experiment, parse_arms(arms), BUDGETS[budget], sweep, {}, data="d", **changes
    )


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("sweep", [None, make_sweep("dropout", [0, 0.5])])
def test_every_arm_gets_the_same_rates_seeds_and_steps(budget, sweep):
    asked = recipe(budget, sweep=sweep)
    for value in asked.values:
        cells = asked.search_cells(asked.rates, value, threads=1)
        per_arm = {
            arm.name: sorted(
                (c.lr, c.seed, c.steps, c.eval_every, c.batch_size, c.target) for c in cells if c.arm == arm
            )
            for arm in asked.arms
        }
        assert len(per_arm["none"]) == len(asked.rates) * BUDGETS[budget].search_seeds
        assert per_arm["none"] == per_arm["batch"] == per_arm["layer+adamw"]


def test_final_seeds_are_paired_and_fresh():
    asked = recipe()
    finals = asked.final_cells({"none": 1.0, "batch": 0.1, "layer+adamw": 0.01}, None, threads=1)
    seeds = {arm.name: [c.seed for c in finals if c.arm == arm] for arm in asked.arms}
    assert seeds["none"] == seeds["batch"] == seeds["layer+adamw"] == list(range(10))
    assert not set(seeds["none"]) & set(asked.search_seeds)
    assert {c.lr for c in finals if c.arm.name == "batch"} == {0.1}


def test_the_seeds_of_the_search_are_as_many_as_asked():
    asked = recipe("default", search_seeds=1)
    assert len(asked.search_seeds) == 1
    assert asked.search_seeds == recipe("quick").search_seeds  # another budget does not look at other data
    with pytest.raises(LabError, match="--search-seeds 0: give a whole number from 1"):
        recipe("default", search_seeds=0)


@pytest.mark.parametrize("rates", [SGD_RATES, MOMENTUM_RATES, ADAM_RATES])
def test_grids_are_log_spaced_and_no_budget_searches_fewer_than_seven(rates):
    ratios = [b / a for a, b in pairwise(rates)]
    assert all(2.9 < ratio < 3.4 for ratio in ratios)
    for budget in BUDGETS.values():
        assert len(middle(rates, budget.rates)) >= LEAST_RATES
    assert middle(rates, 7) == rates[1:-1]


def runs(*steps, best=0.5, state="done"):
    return [{"state": state, "steps_to_target": s, "best_validation": best} for s in steps]


def test_the_best_rate_is_the_one_that_gets_there_in_fewest_steps():
    results = {0.1: runs(200, 210, 190), 1.0: runs(80, 90, 300), 3.0: runs(50, None, None)}
    assert best_rate(results, ACCURACY) == 1.0  # 3.0 has the fastest run, but most of its runs never arrive


def test_of_equal_medians_the_better_validation_then_the_smaller_rate():
    results = {0.1: runs(80, best=0.95), 0.3: runs(80, best=0.97), 1.0: runs(80, best=0.97)}
    assert best_rate(results, ACCURACY) == 0.3
    assert best_rate(results, BITS) == 0.1
    never = {0.1: runs(None, best=0.6), 0.3: runs(None, best=0.8), 1.0: runs(None, best=math.nan)}
    assert best_rate(never, ACCURACY) == 0.3


def test_a_diverged_rate_counts_as_never_there_and_failed_ones_not_at_all():
    results = {0.1: runs(500), 0.3: runs(None, state="diverged", best=None), 1.0: runs(None, state="failed")}
    assert best_rate(results, ACCURACY) == 0.1
    assert best_rate({0.1: runs(None, state="failed")}, ACCURACY) is None


def test_with_two_seeds_both_must_arrive():
    assert best_rate({0.1: runs(10, None), 0.3: runs(90, 95)}, ACCURACY) == 0.3


def test_the_grid_grows_where_a_best_lies_on_its_edge_three_steps_at_most():
    rates, added = list(SGD_RATES), []
    for _ in range(EXTENSIONS + 2):
        new = extend(rates, {"none": max(rates), "batch": 0.1}, SGD_RATES)
        added += new
        rates += new
    assert added == [100.0, 300.0, 1000.0]
    rates, added = list(SGD_RATES), []
    for _ in range(EXTENSIONS + 2):
        new = extend(rates, {"none": min(rates)}, SGD_RATES)
        added += new
        rates += new
    assert added == [0.001, 0.0003, 0.0001]


def test_both_edges_grow_at_once_and_an_inner_best_grows_nothing():
    assert extend(SGD_RATES, {"none": 30.0, "batch": 0.003}, SGD_RATES) == (0.001, 100.0)
    assert extend(SGD_RATES, {"none": 10.0, "batch": 0.01, "failed": None}, SGD_RATES) == ()


def test_a_bound_that_was_hit_is_recorded():
    best = {"none": 30.0, "batch": 0.1, "layer": 0.003, "failed": None}
    choices = choose(SGD_RATES, best)
    assert {arm: choice.bound_hit for arm, choice in choices.items()} == {"none": "high", "batch": None, "layer": "low"}


def test_a_swept_batch_size_sees_equally_many_samples():
    asked = recipe(sweep=make_sweep("batch-size", [4, 16, 32]), steps=100)
    cells = {value: asked.search_cells([0.1], value, threads=1)[0] for value in asked.values}
    assert {value: cell.steps * cell.batch_size for value, cell in cells.items()} == dict.fromkeys((4, 16, 32), 1600)
    assert {value: cell.eval_every * cell.batch_size for value, cell in cells.items()} == dict.fromkeys((4, 16, 32), 64)


def test_a_swept_knob_of_the_arm_or_of_the_task_reaches_the_run():
    by_init = recipe(sweep=make_sweep("init", [0.1, 1]))
    cell = by_init.search_cells([0.1], 0.1, threads=1)[1]
    assert (cell.arm.name, cell.trained_arm.init) == ("batch", 0.1)
    assert cell.knob == {"name": "init", "value": 0.1}
    by_width = recipe(sweep=make_sweep("width", [4, 8]))
    assert by_width.search_cells([0.1], 4, threads=1)[0].options == {"width": 4}


def test_any_change_of_the_question_changes_its_hash_and_the_cell_names():
    asked = recipe()
    other = [
        recipe(budget="quick"),
        recipe(arms="none,batch"),
        recipe(seeds=3),
        recipe(steps=50),
        recipe(batch_size=8),
        recipe(target=0.9),
        replace(asked, data="e"),
        replace(asked, code="f"),
        replace(asked, options={"width": 4}),
        recipe(sweep=make_sweep("init", [1])),
    ]
    assert len({asked.hash, *(r.hash for r in other)}) == 11
    assert recipe().hash == asked.hash
    cell = asked.search_cells([0.1], None, threads=1)[0]
    changes = ({"lr": 0.2}, {"seed": 5}, {"steps": 1}, {"threads": 2}, {"data": "e"}, {"code": "f"}, {"phase": "final"})
    assert len({cell.name, *(replace(cell, **change).name for change in changes)}) == 8


def test_names_of_cells_are_plain_file_names():
    for cell in recipe(arms="none+init:0.1,group:8+dropout:0.2+adamw").search_cells([0.001], None, threads=1):
        assert cell.name.replace("-", "").replace(".", "").isalnum()
        assert cell.config()["hash"] in cell.name


def test_a_grid_of_few_rates_and_senseless_numbers_are_refused():
    with pytest.raises(LabError, match=r"gives 3 learning rates.*at least 7"):
        recipe(experiment=replace(tiny(), rates=(0.1, 1, 10)))
    for name in ("seeds", "steps", "batch_size"):
        with pytest.raises(LabError, match=r"0: give a whole number from 1"):
            recipe(**{name: 0})


def test_the_baseline_is_the_network_without_a_norm_unless_told_otherwise():
    assert recipe(arms="batch,none").baseline == "none"
    assert recipe(arms="batch,layer").baseline == "batch"
    assert recipe(arms="batch,none", experiment=replace(tiny(), baseline="batch")).baseline == "batch"
