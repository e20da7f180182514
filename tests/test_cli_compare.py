"""`normkit compare` as it is typed: the answer first, one clear error, nothing lost."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from normkit.cli import main
from normkit.cli.progress import Bars, Lines
from normkit.lab import comparison
from normkit.lab.arm import parse_arms
from normkit.lab.recipe import BUDGETS
from normkit.vocabulary.record import read_cells, read_experiment
from small_experiments import PATH, tiny

TINY = f"{PATH}:tiny"
EXAMPLE = PATH.parents[1] / "examples" / "compare_own_experiment.py"


def typed(*words: str) -> int:
    return main(["compare", *words])


def test_the_answer_then_the_table_then_the_page_then_the_next_command(tmp_path, capsys):
    out = str(tmp_path / "a")
    assert typed(TINY, "--quick", "--parallel", "1", "--out", out) == 0
    shown = capsys.readouterr()
    lines = [line for line in shown.out.splitlines() if line.strip()]
    assert lines[0].startswith("quick look, not evidence")
    assert any(line.startswith("batch norm") for line in lines)
    assert f"page: {tmp_path / 'a' / 'report.html'}" in lines[-2]
    assert lines[-1] == f"next: normkit compare {TINY} --parallel 1"
    assert "learning-rate search: 14 runs (2 arms, 7 rates, 1 seed)" in shown.err
    assert "final runs: 6 of 6 runs" in shown.err
    assert (tmp_path / "a" / "report.html").exists()
    assert read_experiment(tmp_path / "a")["command"] == f"normkit compare {TINY} --quick --parallel 1 --out {out}"


def test_json_is_the_summary_and_nothing_else(tmp_path, capsys):
    out = str(tmp_path / "a")
    assert typed(TINY, "--quick", "--json", "--parallel", "1", "--out", out, "--sweep", "dropout=0,0.5") == 0
    shown = capsys.readouterr()
    summary = json.loads(shown.out, parse_constant=pytest.fail)
    assert shown.err == ""
    assert summary["answer"].startswith("quick look, not evidence")
    assert summary["page"] == str(tmp_path / "a" / "report.html")
    assert [point["knob"] for point in summary["points"]] == [0, 0.5]
    assert {arm["name"] for arm in summary["points"][0]["arms"]} == {"none", "batch"}
    assert len(summary["runs"]) >= 2 * (14 + 6)


@pytest.fixture
def no_page(monkeypatch):
    """Stops where training would begin, and hands back what was understood."""
    understood = {}

    def instead(self):
        understood.update(recipe=self.recipe, parallel=self.parallel, seconds=self.checkpoint_seconds)
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison.Engine, "go", instead)
    return understood


def test_every_option_reaches_the_recipe(tmp_path, no_page, capsys):
    words = [TINY, "--arms", "none+adamw, batch+dropout:0.2", "--sweep", "batch-size=4,8", "--seeds", "4", "--thorough"]
    words += ["--out", str(tmp_path / "a"), "--parallel", "loky:3", "--steps", "9", "--batch-size", "4"]
    words += ["--target", "0.6", "--set", "width=5", "--checkpoint-seconds", "7"]
    assert typed(*words) == 130
    recipe = no_page["recipe"]
    assert recipe.arms == parse_arms("none+adamw, batch+dropout:0.2")
    assert recipe.sweep.values == (4, 8)
    assert (len(recipe.seeds), recipe.budget, recipe.steps, recipe.batch_size) == (4, "thorough", 9, 4)
    assert (recipe.target, recipe.options) == (0.6, {"width": 5})
    assert len(recipe.search_seeds) == BUDGETS["thorough"].search_seeds
    assert (no_page["parallel"].workers, no_page["seconds"]) == (3, 7.0)
    assert "normkit compare" in capsys.readouterr().err


def test_interrupted_it_says_how_to_go_on(tmp_path, no_page, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert typed("digits", "--quick", "--norms", "none,batch", "--depth", "2") == 130
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "nothing is lost. The same command goes on" in shown.err
    assert shown.err.splitlines()[-1].strip() == "normkit compare digits --quick --norms none,batch --depth 2"
    assert no_page["recipe"].options == {"depth": 2}
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [f"digits-{no_page['recipe'].hash}"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["digit"], "unknown task 'digit'; did you mean 'digits'"),
        (["exp.py:main"], "no file exp.py"),
        ([TINY, "--norms", "none,bacth"], "did you mean"),
        ([TINY, "--arms", "none+adam"], "did you mean 'adamw'"),
        ([TINY, "--norms", "none", "--arms", "none"], "norms and arms are both given"),
        ([TINY, "--sweep", "dropout"], "write knob=values"),
        ([TINY, "--sweep", "batch-size=8,4096"], "a batch of 4096 samples cannot be drawn from 32"),
        ([TINY, "--quick", "--thorough"], "--quick and --thorough exclude each other"),
        ([TINY, "--parallel", "mpi"], "--parallel 'mpi' is unknown"),
        ([TINY, "--seeds", "0"], "--seeds 0: give a whole number from 1"),
        ([TINY, "--target", "95"], "no run could reach that; for 95 % write --target 0.95"),
        ([TINY, "--set", "width"], "--set 'width': write key=value"),
        ([TINY, "--set", "wdth=3"], "takes no option 'wdth'; did you mean 'width'"),
        ([TINY, "--depth", "3"], "takes no option 'depth'"),
        (["digits", "--data", "nowhere"], "--data nowhere: no such file or directory"),
        (["tabular", "--data", "broken.npz"], "broken.npz: not an .npz file"),
        ([TINY, "--arms", "group:3"], "(8) must be divisible by num_groups (3)"),
        ([f"{PATH}:raises"], "raised KeyError: 'where are my data?'"),
    ],
)
def test_a_mistake_gets_one_clear_error_and_status_2(tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 and no more")
    assert typed(*words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert says in shown.err
    assert "Traceback" not in shown.err
    assert not (tmp_path / "runs").exists()


def test_another_question_in_the_same_directory_is_refused(tmp_path, capsys):
    out = str(tmp_path / "a")
    comparison.compare(TINY, budget="quick", out=out, parallel=1, watcher=None)
    capsys.readouterr()
    assert typed(TINY, "--quick", "--target", "0.7", "--out", out) == 2
    assert "target was 0.8, now 0.7. Its results are kept" in capsys.readouterr().err


def test_when_every_run_crashes_that_is_said_with_the_reason(tmp_path, capsys):
    words = [f"{PATH}:crashing", "--quick", "--norms", "batch", "--parallel", "1", "--out", str(tmp_path / "a")]
    assert typed(*words) == 2
    said = capsys.readouterr().err
    assert "all 7 runs failed, the first with: RuntimeError: the third step is one too many" in said
    assert "Traceback" not in said
    assert all("in forward" in cell.status["traceback"] for cell in read_cells(tmp_path / "a"))
    assert {cell.state for cell in read_cells(tmp_path / "a")} == {"failed"}


def test_the_example_of_the_guide_runs(tmp_path, capsys):
    words = [f"{EXAMPLE}:spirals", "--quick", "--norms", "none,layer", "--seeds", "1", "--steps", "20"]
    assert typed(*words, "--parallel", "1", "--set", "turns=0.5", "--out", str(tmp_path / "a")) == 0
    assert capsys.readouterr().out.startswith("quick look, not evidence")
    assert read_experiment(tmp_path / "a")["options"] == {"turns": 0.5}


def test_the_experiment_in_the_guide_runs_as_it_is_printed(tmp_path, capsys):
    guide = (PATH.parents[1] / "docs" / "compare.md").read_text()
    (source,) = [block for block in guide.split("```python\n") if block.startswith("# exp.py")]
    (tmp_path / "exp.py").write_text(source.split("```")[0])
    words = [f"{tmp_path / 'exp.py'}:experiment", "--quick", "--seeds", "1", "--set", "steps=20", "--parallel", "1"]
    assert typed(*words, "--arms", "none, batch+dropout:0.1", "--out", str(tmp_path / "a")) == 0
    assert capsys.readouterr().out.startswith("quick look, not evidence")
    assert {cell.state for cell in read_cells(tmp_path / "a")} <= {"done", "diverged"}


def test_a_persons_own_data_from_the_command_line(tmp_path, capsys):
    x = np.random.default_rng(0).random((120, 5))
    np.savez(tmp_path / "mine.npz", x=x, y=(x.sum(1) > 2.5).astype(int))
    words = ["tabular", "--data", str(tmp_path / "mine.npz"), "--quick", "--norms", "none,batch", "--seeds", "1"]
    assert typed(*words, "--steps", "10", "--parallel", "1", "--out", str(tmp_path / "a")) == 0
    assert "mine" in read_experiment(tmp_path / "a")["title"]
    assert read_experiment(tmp_path / "a")["split"] == {"train": 72, "validation": 18, "test": 30}
    assert capsys.readouterr().out.startswith("quick look, not evidence")


def plan(display) -> None:
    recipe = comparison.make_recipe(
        comparison.Source("tiny", tiny), tiny(), parse_arms("none,batch"), BUDGETS["quick"], None, {}, data=""
    )
    cells = recipe.search_cells((0.1, 1.0), None, threads=1)
    display.planned("search", cells, [cells[0].name], ahead=6)
    display.done(cells[1], {"state": "done"})
    display.done(cells[2], {"state": "failed", "reason": "RuntimeError: no"})
    finals = recipe.final_cells({"none": 0.1, "batch": 0.1}, None, threads=1)
    display.planned("final", finals, [], ahead=0)
    display.done(finals[0], {"state": "done"})


def test_plain_lines_say_what_runs_and_what_failed():
    stream = io.StringIO()
    plan(Lines(Console(file=stream, width=40)))
    said = stream.getvalue().splitlines()
    assert said[0] == "learning-rate search: 4 runs (2 arms, 2 rates, 1 seed), 1 of them finished before"
    assert any(line.startswith("failed: none-lr1-s1000-") and line.endswith("RuntimeError: no") for line in said)
    assert any(line.startswith("final runs: 6 runs (2 arms, 3 seeds)") for line in said)


def test_a_reason_that_fails_many_runs_is_said_once_and_counted():
    stream = io.StringIO()
    display = Lines(Console(file=stream, width=40))
    plan(display)
    recipe = comparison.make_recipe(
        comparison.Source("tiny", tiny), tiny(), parse_arms("none,batch"), BUDGETS["quick"], None, {}, data=""
    )
    display.planned("search", recipe.search_cells((3.0,), None, threads=1), [], ahead=0)
    for cell in recipe.search_cells((3.0,), None, threads=1):
        display.done(cell, {"state": "failed", "reason": "RuntimeError: no"})
    display.planned("final", [], [], ahead=0)
    said = stream.getvalue()
    assert said.count("RuntimeError: no") == 1
    assert "2 of 2 runs, 3 failed, about" in said
    assert "0 runs" not in said


def test_bars_show_every_arm_and_the_time_left():
    from rich.progress import Progress

    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Progress(console=console, disable=True) as progress:
        display = Bars(console, progress)
        plan(display)
        shown = {task.description: (task.completed, task.total) for task in progress.tasks}
        assert shown == {"none": (1, 3), "batch": (0, 3)}
        assert "left" in progress.tasks[0].fields["note"]


@pytest.mark.slow
def test_ctrl_c_in_a_real_run_leaves_a_directory_that_resumes(tmp_path):
    """A whole process with loky workers, interrupted as a terminal would do it: the signal goes to the whole group."""
    out = tmp_path / "a"
    command = [
        sys.executable,
        "-m",
        "normkit",
        "compare",
        "digits",
        "--quick",
        "--norms",
        "none,batch",
        "--out",
        str(out),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not list(out.glob("cells/*/metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "nothing is lost. The same command goes on" in said
    assert "Traceback" not in said
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("quick look, not evidence")
    assert all(cell.finished for cell in read_cells(out))


@pytest.mark.slow
def test_workers_of_a_killed_command_end_themselves_and_the_command_resumes(tmp_path):
    out = tmp_path / "a"
    command = [
        sys.executable,
        "-m",
        "normkit",
        "compare",
        "digits",
        "--quick",
        "--norms",
        "none,batch",
        "--out",
        str(out),
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    while not list(out.glob("cells/*/metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.1)
    group = process.pid
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while _alive(group):
        assert time.monotonic() < deadline, "a worker outlived its command"
        time.sleep(0.2)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(cell.finished for cell in read_cells(out))


def _alive(group: int) -> bool:
    """Whether a process of the group still trains; joblib's resource tracker is allowed to tidy up."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            same = os.getpgid(int(path.name)) == group
            if same and b"resource_tracker" not in (path / "cmdline").read_bytes():
                return True
        except (ProcessLookupError, FileNotFoundError):
            continue
    return False
