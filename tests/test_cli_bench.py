"""``normkit bench`` on the command line: what it plans, what it prints, and one clear error for every wrong word."""

from __future__ import annotations

import json
import re

import pytest

from normkit import cli
from normkit.bench import cases, peers
from normkit.cli import bench
from normkit.report import bench_page
from normkit.vocabulary.record import encode, read_lines

TINY = ["--op", "layer_norm", "--shape", "6,16", "--quick", "--allocator", "default", "--threads", "1"]


@pytest.fixture
def normkit(capsys, monkeypatch, tmp_path):
    """Runs one command line in an empty directory: (exit status, standard output, standard error)."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def call(*argv: str) -> tuple[int, str, str]:
        status = cli.main(["bench", *argv])
        return (status, *capsys.readouterr())

    return call


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--op", "bacth_norm"], "--op 'bacth_norm' is unknown.\n  did you mean batch_norm?\n  choose from: "),
        (["--op", "conv*"], "no op fits 'conv*'"),
        (["--dtype", "fp32"], "--dtype 'fp32' is unknown"),
        (["--layout", "nhwc"], "choose from: contiguous, channels_last"),
        (["--implementation", "nativ"], "--implementation 'nativ' is unknown"),
        (["--shape", "8,-1"], "--shape '8,-1' is not a shape"),
        (["--op", "instance_norm", "--shape", "8,64"], "instance_norm: cannot run on 8x64"),
        (["--op", "rms_norm", "--layout", "channels_last"], "channels_last is a layout of images"),
        (["--quick", "--thorough"], "--quick and --thorough exclude each other"),
        (["--threads", "0"], "--threads 0: at least one thread"),
        (["--device", "cuda:77"], "--device cuda:77 cannot be used here"),
        (["--device", "gpu"], "--device gpu cannot be used here"),
    ],
)
def test_a_wrong_word_gives_one_error_and_starts_nothing(normkit, tmp_path, argv, message):
    status, output, errors = normkit(*argv)
    assert (status, output) == (2, "")
    assert message in errors
    assert "Traceback" not in errors
    assert len(errors.strip().splitlines()) <= 5
    assert list(tmp_path.iterdir()) == []


def test_records_of_another_run_are_not_mixed_with(normkit, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "bench.jsonl").write_text('{"kind": "environment"}\n')
    status, _, errors = normkit(*TINY, "--out", "old")
    assert status == 2
    assert "--out old: holds the records of another run" in errors


def test_list_shows_every_case_with_its_reason_and_times_nothing(normkit, tmp_path):
    status, output, errors = normkit("--list", "--dtype", "float32")
    assert (status, errors) == (0, "")
    lines = output.strip().splitlines()
    chosen = cases.choose("default")
    count = sum(len(case.layouts) for case in chosen)
    assert lines[0] == f"{count} cells would be timed, each with the allocator default and pinned"
    for case in chosen:
        shape = ",".join(map(str, case.shape))
        assert any(line.startswith(f"{case.op} ") and f" {shape} " in line and case.reason in line for line in lines)
    assert lines[-1] == "next: normkit bench --quick"
    assert list(tmp_path.iterdir()) == []


def test_list_as_json_has_the_same_cells(normkit):
    status, output, _ = normkit("--list", "--json", "--op", "resnet50", "--op", "dyt", "--dtype", "bfloat16")
    told = json.loads(output)
    assert status == 0
    cells = [(cell["op"], cell["dtype"], cell["layout"]) for cell in told["cells"]]
    assert cells[0] == ("dyt", "bfloat16", "contiguous")
    assert cells[1:] == [("resnet50", "bfloat16", "contiguous"), ("resnet50", "bfloat16", "channels_last")]


def test_a_run_prints_its_answer_first_and_writes_records_and_page(normkit, tmp_path):
    status, output, errors = normkit(*TINY, "--out", "here")
    assert (status, errors) == (0, "")
    lines = output.strip().splitlines()
    records = read_lines(tmp_path / "here" / "bench.jsonl")
    assert lines[0] == bench_page.answer(records)
    assert [record.get("implementation") for record in records] == [None, "torch", "normkit", "copy"]
    (row,) = (line for line in lines[:6] if line.startswith("layer_norm "))
    assert row.split()[:4] == ["layer_norm", "6x16", "float32", "contiguous"]
    assert bench_page.tables(records)[0].rows[0][4] == row.split()[4]
    assert "page: here/report.html" in lines
    assert re.fullmatch(r"next: normkit bench .*", lines[-1])
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"bench.jsonl", "report.html", "report.md"}
    environment = records[0]
    assert environment["command"].startswith("normkit bench --op layer_norm")
    assert {"torch", "processor", "Python", "created", "commit"} <= set(environment)
    assert environment["threads of torch"] == 1
    assert str(tmp_path) not in (tmp_path / "here" / "bench.jsonl").read_text()


@pytest.mark.slow
def test_json_prints_the_records_and_nothing_else(normkit, tmp_path):
    status, output, errors = normkit(*TINY, "--json", "--out", "there")
    told = json.loads(output)
    assert (status, errors) == (0, "")
    assert told["records"] == encode(read_lines(tmp_path / "there" / "bench.jsonl"))
    assert told["answer"] == bench_page.answer(told["records"])


RED = {
    "kind": "op",
    "op": "layer_norm",
    "shape": [6, 16],
    "dtype": "float32",
    "layout": "contiguous",
    "implementation": "normkit",
    "state": "refused",
    "why": "parity is red, so it is not timed: y: error 5.0e-02, may be 8.0e-06",
    "allocator": "default",
}


def test_a_wrong_result_is_a_finding(normkit, monkeypatch):
    def run(plan, directory, environment, progress):
        directory.mkdir(parents=True)
        return [{"kind": "environment", **environment}, RED]

    monkeypatch.setattr(bench, "run", run)
    status, output, _ = normkit(*TINY)
    assert status == 1
    assert output.startswith("1 measurements have no number because parity is red or the process died")


@pytest.fixture
def planned(normkit, monkeypatch):
    """The plan that a command line leads to."""

    def plan_of(*argv):
        seen = []

        def run(plan, directory, environment, progress):
            directory.mkdir(parents=True)
            seen.append(plan)
            return []

        monkeypatch.setattr(bench, "run", run)
        status, _, errors = normkit(*argv)
        assert (status, errors) == (0, "")
        return seen[0]

    return plan_of


def test_quick_is_one_case_per_norm_without_a_compiler(planned):
    plan = planned("--quick")
    assert {task["layout"] for task in plan.tasks} == {"contiguous"}
    assert {task["dtype"] for task in plan.tasks} == {"float32"}
    assert plan.effort.wanted == ("torch", "normkit")
    assert tuple(plan.allocators) == ("default", "pinned")


def test_overhead_takes_every_backend_and_the_noise(planned):
    plan = planned("--op", "overhead", "--threads", "3", "--allocator", "pinned")
    assert peers.AGAIN in plan.effort.wanted
    assert {name for name in peers.all_names() if name.startswith("normkit")} <= set(plan.effort.wanted)
    assert "torch.compile" not in plan.effort.wanted
    assert (plan.threads, tuple(plan.allocators)) == (3, ("pinned",))


def test_words_may_be_repeated(planned):
    plan = planned("--op", "batch_norm*", "--op", "unet", "--dtype", "float32", "--dtype", "float16")
    assert {task.get("model") or task["case"]["norm"] for task in plan.tasks} == {"batch", "unet"}
    assert {task["dtype"] for task in plan.tasks} == {"float32", "float16"}
