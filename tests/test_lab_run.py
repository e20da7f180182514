"""Whole comparisons: fairness on disk, resumption, parallel backends, crashes, and directories that are not ours."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import joblib
import pytest
import torch
from joblib._parallel_backends import ThreadingBackend

from kills import slow
from normkit.lab import LabError, compare
from normkit.lab.recipe import BUDGETS
from normkit.vocabulary.record import read_cells, read_experiment, read_json
from small_experiments import PATH, tiny

TINY = f"{PATH}:tiny"
TIME_FIELDS = {
    "attempts",
    "train_seconds",
    "seconds_to_target",
    "ms_per_step",
    "norm_share",
    "peak_memory_mb",
    "cpu_seconds",
}


@pytest.fixture
def no_page(monkeypatch):
    """Leaves out the analysis and the page, which have tests of their own: what comes back is the directory."""
    monkeypatch.setattr("normkit.lab.comparison.conclude", lambda directory: directory)


def quick(out, task=TINY, **options) -> Path:
    return compare(task, budget="quick", out=out, **({"parallel": 1} | options))


def results(directory) -> dict:
    """Everything about every cell that does not measure time."""
    found = {}
    for cell in read_cells(Path(directory)):
        status = {key: value for key, value in cell.status.items() if key not in TIME_FIELDS}
        metrics = [{key: value for key, value in line.items() if key != "seconds"} for line in cell.metrics]
        found[cell.name] = {"config": cell.config, "status": status, "metrics": metrics, "inside": cell.inside}
    return found


def by_question(directory) -> dict:
    """The metrics by what was asked; the names of cells also carry the number of threads."""
    keys = ("lr", "seed", "phase")
    return {
        (found["config"]["arm"]["name"], *(found["config"][key] for key in keys)): found["metrics"]
        for found in results(directory).values()
    }


def states(directory) -> dict[str, str]:
    return {cell.name: cell.state for cell in read_cells(Path(directory))}


@pytest.mark.usefixtures("no_page")
def test_a_comparison_is_fair_on_disk(tmp_path):
    quick(tmp_path / "a")
    experiment, cells = read_experiment(tmp_path / "a"), read_cells(tmp_path / "a")
    searched: dict[str, list] = {"none": [], "batch": []}
    for cell in cells:
        if cell.config["phase"] == "search":
            searched[cell.config["arm"]["name"]].append((cell.config["lr"], cell.config["seed"]))
    searched = {arm: sorted(trials) for arm, trials in searched.items()}
    assert searched["none"] == searched["batch"]
    assert sorted({lr for lr, _ in searched["none"]}) == experiment["rates"]["searched"][""]
    assert len({lr for lr, _ in searched["none"]}) >= 7
    finals = [c for c in cells if c.config["phase"] == "final"]
    assert len(finals) == 2 * BUDGETS["quick"].seeds
    for seed in experiment["seeds"]:
        pair = [c for c in finals if c.config["seed"] == seed]
        assert {c.config["arm"]["name"] for c in pair} == {"none", "batch"}
        assert len({c.status["initial_weights"] for c in pair}) == 1  # the same linear weights
        assert len({c.config["data"] for c in pair}) == 1
    assert len({c.status["initial_weights"] for c in finals}) == len(experiment["seeds"])
    for arm, choice in experiment["chosen"].items():
        assert {c.config["lr"] for c in finals if c.config["arm"]["name"] == arm} == {choice["lr"]}
    assert all(c.status["test"] is None for c in cells if c.config["phase"] == "search")
    assert all(c.finished and c.status["peak_memory_mb"] > 0 for c in cells)


@pytest.mark.usefixtures("no_page")
def test_the_same_command_again_runs_nothing(tmp_path):
    quick(tmp_path / "a")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("status.json")}
    quick(tmp_path / "a")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("status.json")} == before


@pytest.mark.usefixtures("no_page")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seeds": 5}, r"seeds was \[0, 1, 2\], now \[0, 1, 2, 3, 4\]"),
        ({"steps": 8}, "steps was 12, now 8"),
        ({"arms": "none,rms"}, "arms was none, batch, now none, rms"),
        ({"target": 0.7}, "target was 0.8, now 0.7"),
        ({"options": {"width": 6}}, r"options was \{\}, now \{'width': 6\}"),
    ],
)
def test_a_changed_question_never_meets_old_results(tmp_path, change, words):
    quick(tmp_path / "a")
    before = results(tmp_path / "a")
    with pytest.raises(LabError, match=rf"holds another experiment: .*{words}.*Its results are kept"):
        quick(tmp_path / "a", **change)
    assert results(tmp_path / "a") == before


@pytest.mark.usefixtures("no_page")
def test_without_out_every_question_has_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = quick(None), quick(None, target=0.7)
    assert first == quick(None)
    assert first != second
    assert {path.parent for path in (first, second)} == {Path("runs")}
    assert first.name.startswith("tiny-")
    assert first.name.endswith(read_experiment(first)["hash"])


@pytest.mark.usefixtures("no_page")
def test_a_changed_experiment_file_is_another_question(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, source in (("one.py", PATH.read_text()), ("two.py", PATH.read_text().replace("* 3 + 1", "* 3 + 1.5"))):
        (tmp_path / name).write_text(source)
    first = quick("a", task="one.py:tiny")
    (tmp_path / "one.py").write_text((tmp_path / "two.py").read_text())
    from normkit import imported
    from normkit.lab import load

    for cache in (imported._file, load._load):  # a new process would have read neither
        cache.cache_clear()
    with pytest.raises(LabError, match=r"code was .*, now "):
        quick("a", task="one.py:tiny")
    assert "pending" not in states(first).values()


def test_a_directory_with_other_files_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(LabError, match="exists and is no run directory"):
        quick(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.usefixtures("no_page")
def test_a_crash_is_recorded_with_its_traceback_and_stops_nobody(tmp_path):
    quick(tmp_path / "a", task=f"{PATH}:crashing")
    by_arm: dict[str, set] = {}
    for cell in read_cells(tmp_path / "a"):
        by_arm.setdefault(cell.config["arm"]["name"], set()).add(cell.state)
        if cell.state == "failed":
            assert cell.status["reason"] == "RuntimeError: the third step is one too many"
            assert "in forward" in cell.status["traceback"]
    assert by_arm["batch"] == {"failed"}
    assert "done" in by_arm["none"] <= {"done", "diverged"}
    assert set(read_experiment(tmp_path / "a")["chosen"]) == {"none"}


@pytest.mark.usefixtures("no_page")
def test_a_failed_run_is_tried_again_by_the_same_command(tmp_path):
    quick(tmp_path / "a")
    victim = next(c for c in read_cells(tmp_path / "a") if c.config["phase"] == "final")
    path = tmp_path / "a" / "cells" / victim.name / "status.json"
    path.write_text(json.dumps({"state": "failed", "reason": "out of memory", "attempts": 1, "traceback": ""}))
    quick(tmp_path / "a")
    again = read_json(path)
    assert (again["state"], again["attempts"], again["test"]) == ("done", 2, victim.status["test"])


@pytest.mark.usefixtures("no_page")
def test_an_arm_whose_search_crashed_is_searched_again_and_the_rates_of_the_others_stay(tmp_path):
    quick(tmp_path / "a")
    whole = read_experiment(tmp_path / "a")
    finals = {name: found for name, found in results(tmp_path / "a").items() if found["config"]["phase"] == "final"}
    for cell in read_cells(tmp_path / "a"):
        if cell.config["arm"]["name"] == "batch":
            place = tmp_path / "a" / "cells" / cell.name / "status.json"
            place.write_text(json.dumps({"state": "failed", "reason": "out of memory", "attempts": 1}))
    content = whole | {"chosen": {"none": whole["chosen"]["none"] | {"mark": 1}}}
    (tmp_path / "a" / "experiment.json").write_text(json.dumps(content))
    quick(tmp_path / "a")
    again = read_experiment(tmp_path / "a")["chosen"]
    assert again == {"none": content["chosen"]["none"], "batch": whole["chosen"]["batch"]}
    assert set(states(tmp_path / "a").values()) <= {"done", "diverged"}
    assert {name: results(tmp_path / "a")[name] for name in finals} == finals


@pytest.mark.usefixtures("no_page")
def test_runs_that_go_on_elsewhere_are_noted_and_a_command_that_runs_nothing_notes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no repository, so no commit
    quick(tmp_path / "a")
    began = read_experiment(tmp_path / "a")
    monkeypatch.setattr("normkit.__version__", "9.9")
    monkeypatch.setattr(torch, "__version__", "9.8")
    quick(tmp_path / "a")
    assert read_experiment(tmp_path / "a") == began
    victim = next((tmp_path / "a" / "cells").glob("*-s0-*"))
    shutil.rmtree(victim)
    quick(tmp_path / "a")
    (later,) = read_experiment(tmp_path / "a")["continued_in"]
    assert later == began["environment"] | {"torch": "9.8", "normkit": "9.9"}


@pytest.mark.usefixtures("no_page")
def test_a_status_that_cannot_be_read_is_named_and_nothing_is_lost(tmp_path):
    quick(tmp_path / "a")
    before = results(tmp_path / "a")
    final = next(name for name, found in before.items() if found["config"]["phase"] == "final")
    victim = tmp_path / "a" / "cells" / final / "status.json"
    victim.write_text(victim.read_text()[:20])
    with pytest.raises(
        LabError, match=r"status\.json: not a JSON document .*delete the file and run the command again"
    ):
        quick(tmp_path / "a")
    victim.unlink()
    quick(tmp_path / "a")
    assert results(tmp_path / "a") == before


@pytest.mark.usefixtures("no_page")
def test_a_diverging_experiment_ends_with_diverged_runs_and_a_bound(tmp_path):
    quick(tmp_path / "a", task=f"{PATH}:diverging")
    experiment = read_experiment(tmp_path / "a")
    assert set(states(tmp_path / "a").values()) == {"diverged"}
    assert experiment["chosen"]["none"]["bound_hit"] == "low"
    assert min(experiment["rates"]["searched"][""]) == pytest.approx(1e-3)  # three steps below the base grid


@pytest.mark.usefixtures("no_page")
@pytest.mark.parametrize(
    ("sweep", "values"), [("dropout=0,.5", [0, 0.5]), ("batch-size=8,16", [8, 16]), ("width=2,4", [2, 4])]
)
def test_a_sweep_repeats_the_comparison_for_every_value(tmp_path, sweep, values):
    quick(tmp_path / "a", sweep=sweep)
    experiment, cells = read_experiment(tmp_path / "a"), read_cells(tmp_path / "a")
    assert experiment["sweep"]["values"] == values
    assert set(experiment["chosen"]) == {f"{arm}@{value}" for arm in ("none", "batch") for value in values}
    for value in values:
        finals = [c for c in cells if c.config["knob"]["value"] == value and c.config["phase"] == "final"]
        assert sorted((c.config["arm"]["name"], c.config["seed"]) for c in finals) == [
            (arm, seed) for arm in ("batch", "none") for seed in range(3)
        ]
    if sweep.startswith("dropout"):
        assert all((c.status["variance_ratio"] is None) == (c.config["knob"]["value"] == 0)
                   for c in cells if c.config["phase"] == "final")  # fmt: skip
    if sweep.startswith("batch"):
        assert {c.config["batch_size"] * c.config["steps"] for c in cells} == {192}
    if sweep.startswith("width"):
        parameters = {
            c.config["knob"]["value"]: c.status["parameters"] for c in cells if c.config["arm"]["name"] == "none"
        }
        assert parameters == {2: 6 * 2 + 2 + 2 * 2 + 2, 4: 6 * 4 + 4 + 4 * 2 + 2}


def test_a_value_that_cannot_be_built_is_refused_before_training(tmp_path):
    with pytest.raises(LabError, match="a batch of 64 samples cannot be drawn from 32"):
        quick(tmp_path / "a", sweep="batch-size=8,64")
    with pytest.raises(LabError, match="takes no option 'depht'"):
        quick(tmp_path / "a", sweep="depht=2,4")
    assert not (tmp_path / "a").exists()


@pytest.mark.usefixtures("no_page")
def test_an_experiment_and_a_function_in_memory_can_be_compared(tmp_path):
    by_object = quick(tmp_path / "a", task=tiny())
    by_function = quick(tmp_path / "b", task=tiny, options={"width": 4})
    assert read_experiment(by_object)["task"] == "tiny"
    assert read_experiment(by_function)["options"] == {"width": 4}
    for directory in (by_object, by_function):
        assert len(states(directory)) == 2 * (7 + 3)
        assert set(states(directory).values()) <= {"done", "diverged"}


@pytest.mark.slow
@pytest.mark.usefixtures("no_page")
def test_loky_gives_what_one_after_the_other_gives(tmp_path):
    quick(tmp_path / "one", parallel=1)
    for cell in (tmp_path / "one" / "cells").iterdir():
        assert read_json(cell / "config.json")["threads"] == read_experiment(tmp_path / "one")["environment"]["threads"]
    loky = quick(tmp_path / "two", parallel="loky:2")
    assert read_experiment(loky)["environment"]["parallel"] == "loky"
    assert by_question(loky) == by_question(tmp_path / "one")
    assert len(by_question(loky)) == len(states(loky)) > 0


@pytest.mark.slow
@pytest.mark.usefixtures("no_page")
def test_a_worker_that_dies_is_recorded_and_stops_nobody(tmp_path):
    quick(tmp_path / "a", task=f"{PATH}:deadly", parallel="loky:2", seeds=1)
    ends = {(c.config["arm"]["name"], c.config["phase"]): c.status for c in read_cells(tmp_path / "a")}
    dead = ends.pop(("batch", "final"))
    assert dead["state"] == "failed"
    assert dead["reason"].startswith("its worker process died twice")
    assert dead["attempts"] == 2
    assert {status["state"] for status in ends.values()} <= {"done", "diverged"}
    assert ends["none", "final"]["state"] == "done"


class FakeBackend(ThreadingBackend):
    """A joblib backend under the name of one that is not installed; it counts the cells that pass through it."""

    calls = 0

    def submit(self, func, callback=None):
        type(self).calls += 1
        return super().submit(func, callback)

    apply_async = submit


@pytest.mark.usefixtures("no_page")
def test_cells_go_through_the_backend_that_was_asked_for(tmp_path, monkeypatch):
    ray, ray_joblib = types.ModuleType("ray.util"), types.ModuleType("ray.util.joblib")
    ray_joblib.register_ray = lambda: joblib.register_parallel_backend("ray", FakeBackend)
    monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))
    monkeypatch.setitem(sys.modules, "ray.util", ray)
    monkeypatch.setitem(sys.modules, "ray.util.joblib", ray_joblib)
    monkeypatch.setattr(FakeBackend, "calls", 0)
    quick(tmp_path / "a", parallel="ray:2")
    assert FakeBackend.calls == len(states(tmp_path / "a")) > 0
    assert set(states(tmp_path / "a").values()) <= {"done", "diverged"}
    assert read_experiment(tmp_path / "a")["environment"]["parallel"] == "ray"


@pytest.mark.parametrize(("parallel", "extra"), [("dask", "dask"), ("ray", "ray"), ("1", "lab")])
def test_a_missing_extra_names_the_line_to_type(tmp_path, monkeypatch, parallel, extra):
    for module in ("distributed", "ray.util.joblib", "joblib"):
        if module != "joblib" or extra == "lab":
            monkeypatch.setitem(sys.modules, module, None)  # what an import of a missing module looks like
    with pytest.raises(LabError, match=rf'type: pip install "normkit\[{extra}\]"'):
        quick(tmp_path / "a", parallel=parallel)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("digit", "unknown task 'digit'; did you mean 'digits'"),
        ("nowhere.py:tiny", r"no file nowhere\.py"),
        (f"{PATH}:tinny", "has no function 'tinny'; did you mean 'tiny'"),
        (f"{PATH}:not_an_experiment", "returned int; expected a normkit.lab.Experiment"),
        (f"{PATH}:raises", r"raised KeyError: 'where are my data\?' \(small_experiments\.py, line \d+\)"),
        (f"{PATH}:no_data", r"the data of no_data raised ZeroDivisionError: .* \(small_experiments\.py, line \d+\)"),
        (f"{PATH}:broken_dataset", r"the data of broken_dataset raised KeyError: 'sample 3' \(small_experiments\.py"),
        ("no_such_package.module:tiny", "no module 'no_such_package'"),
        ("normkit.lab:nothing", "normkit.lab has no function 'nothing'"),
    ],
)
def test_what_is_no_experiment_gets_one_sentence(tmp_path, task, words):
    with pytest.raises(LabError, match=words):
        quick(tmp_path / "a", task=task)


@pytest.mark.parametrize(
    ("source", "words"),
    [("def f(:\n", r"raised SyntaxError: .*\(exp\.py, line 1\)"), ("import nothing_here\n", "ModuleNotFoundError")],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(tmp_path, source, words):
    (tmp_path / "exp.py").write_text(source)
    with pytest.raises(LabError, match=rf"reading exp\.py {words}|reading exp\.py raised {words}"):
        quick(tmp_path / "a", task=f"{tmp_path / 'exp.py'}:f")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps=0; give a whole number from 1"),
        ({"eval_every": 2.5}, "eval_every=2.5; give a whole number"),
        ({"model": torch.nn.Linear(6, 2), "name": "mine"}, None),
        ({"model": "resnet"}, "model is str; give a function"),
        ({"metric": len}, "metric is builtin_function_or_method; give a normkit.lab.Metric"),
        ({"optimizer": "adam"}, "unknown optimizer 'adam'; did you mean 'adamw'"),
    ],
)
def test_an_experiment_that_makes_no_sense_is_refused_when_it_is_made(changes, words):
    if words is None:
        assert replace(tiny(), **changes).name == "mine"  # any callable may build
        return
    with pytest.raises(LabError, match=words):
        replace(tiny(), **changes)


@pytest.mark.usefixtures("no_page")
def test_another_network_under_the_same_name_is_another_question(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = quick(None, task=replace(tiny(), name="a name / with signs"))
    assert first.parent == Path("runs")
    assert first.name.startswith("a-name-with-signs-")
    source = "from small_experiments import tiny\ndef model(norm_layer):\n    return tiny().model(norm_layer)\n"
    (tmp_path / "other.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    import other

    with pytest.raises(LabError, match="code was"):
        quick(first, task=replace(tiny(), name="a name / with signs", model=other.model))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"options": {"width": [3]}}, r"option width=\[3\]: give a number"),
        ({"budget": "slow"}, "unknown budget 'slow'; choose quick, default, thorough"),
        ({"arms": "none", "norms": "none"}, "norms and arms are both given"),
        ({"options": {"colour": 3}}, "takes no option 'colour'"),
        ({"norms": "none,bacth"}, "did you mean"),
    ],
)
def test_a_wrong_option_gets_one_sentence(tmp_path, options, words):
    with pytest.raises(LabError, match=words):
        compare(TINY, out=tmp_path / "a", **options)


@pytest.mark.usefixtures("no_page")
@pytest.mark.parametrize(
    ("seed", "kills"), [(0, 5), *(pytest.param(seed, 40, marks=pytest.mark.slow) for seed in (1, 2))]
)
def test_kill_9_at_random_moments_then_the_same_command_gives_the_same_bits(tmp_path, seed, kills):
    script = [sys.executable, str(PATH.with_name("kills.py"))]
    done = subprocess.run(
        [*script, str(tmp_path / "killed"), str(seed), str(kills)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3
    compare(slow, budget="quick", out=tmp_path / "whole", parallel=1, seeds=2, checkpoint_seconds=0)
    attempts = [cell.status["attempts"] for cell in read_cells(tmp_path / "killed")]
    assert max(attempts) > 1  # a kill met a cell that was running
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    assert read_experiment(tmp_path / "killed")["chosen"] == read_experiment(tmp_path / "whole")["chosen"]
    assert not list((tmp_path / "killed").rglob("checkpoint.pt"))
