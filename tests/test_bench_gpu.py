"""bench/gpu without a GPU: what it would do, what it says, and that nothing red is timed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import normkit as nk

ROOT = Path(__file__).parent.parent
GPU = ROOT / "bench" / "gpu"


@pytest.fixture(scope="module")
def gpu():
    """The scripts as modules."""
    sys.path.insert(0, str(GPU))
    names = ("rows", "clocks", "contenders", "models", "paths", "verdict", "measure")
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(GPU))
        for name in names:
            sys.modules.pop(name, None)


def test_the_queue_is_the_table_of_the_records_that_its_command_names(gpu):
    """Every row is in it, measured or not."""
    text = (GPU / "README.md").read_text()
    directories = re.findall(r"--told (records/bench/gpu/\w+)", text)
    assert directories[-1].endswith(nk.kernels.triton.PROVEN)
    records = [record for where in directories for record in gpu.measure.read_lines(ROOT / where / "timings.jsonl")]
    told = gpu.verdict.markdown(records)
    assert told in text, "the table is not that of its command"
    for name in (*(row.name for row in gpu.rows.ROWS), *gpu.rows.MODELS):
        assert f"| {name}" in told
    assert len({row.name for row in gpu.rows.ROWS}) == len(gpu.rows.ROWS)


def test_a_row_for_the_oracle_keeps_channels_groups_and_axes(gpu):
    for row in gpu.rows.ROWS:
        for other in (row.small.case, row.toy.case):
            assert len(other.shape) == len(row.case.shape)
            assert other.op == row.case.op
        axis = -1 if row.case.features_last else 1
        assert row.small.case.shape[axis] == row.case.shape[axis]
        assert all(size > 0 for size in row.small.case.shape)


class Clock:
    """A step takes as long as the list says."""

    device = "cpu"

    def __init__(self, *milliseconds: float) -> None:
        self.left = list(milliseconds)

    def events(self, step):
        return {"forward_ms": 1.0, "step_ms": self.left.pop(0)}

    def wall(self, step):
        return 5.0

    def graph(self, step):
        raise RuntimeError("operation not permitted when stream is capturing")

    def peak(self, step):
        return 3.0

    def copy_bandwidth(self):
        return 1e9


def contenders_of(monkeypatch, gpu, *names):
    made = [(name, lambda: SimpleNamespace(step=lambda given: None)) for name in names]
    monkeypatch.setattr(gpu.measure, "contenders", lambda row, given: iter(made))
    monkeypatch.setattr(gpu.measure, "further", lambda row, given: iter([]))


def test_what_is_red_is_not_timed_and_the_status_says_so(gpu, monkeypatch):
    row = gpu.rows.ROWS[0]
    contenders_of(monkeypatch, gpu, "normkit")
    red = {"kind": "parity", "row": row.name, "dtype": "float32", "state": "red", "why": "x: error 1, may be 0"}
    monkeypatch.setattr(gpu.measure, "checks", lambda row, device: iter([red]))
    written = []
    records = gpu.measure.run([row], [], Clock(1.0), 8.0, written.append)
    assert [r["state"] for r in records if r["kind"] == "timing"] == ["refused"]
    assert len(written) == len(records)
    assert "parity: 0 of 1 green" in gpu.measure.table(records)
    assert "refused: parity is red" in gpu.measure.table(records)


def test_fractions_and_ratios_are_those_of_the_times(gpu, monkeypatch):
    row = gpu.rows.ROWS[0]
    contenders_of(monkeypatch, gpu, "normkit", "torch", "torch.compile")
    monkeypatch.setattr(gpu.measure, "checks", lambda row, device: iter([{"kind": "parity", "state": "green"}]))
    records = gpu.measure.run([row], [], Clock(2.0, 5.0, 3.0), 8.0, lambda record: None)
    mine, eager, _ = [r for r in records if r["kind"] == "timing"]
    toy = row.toy.case
    assert mine["floor_bytes"] == toy.size("bfloat16") * toy.floor(True)[1]
    assert mine["of_copy"]["step"] == pytest.approx(mine["floor_bytes"] / 2e-3 / 1e9)
    assert mine["of_copy"]["forward"] == pytest.approx(4 * toy.size("bfloat16") / 1e-3 / 1e9)
    assert eager["state"] == "measured"
    assert "capturing" in mine["graph_why"]
    line = gpu.measure.table(records).splitlines()[1].split()
    assert line[-5:] == ["2.50", "1.50", "1.00", "missed:", "copy"]


def test_a_path_that_is_wrong_is_red(gpu, monkeypatch):
    import torch

    ones = torch.ones(4)
    path = lambda dtype, device: iter([("y", ones, ones.double()), ("x", ones * 1.25, ones.double())])
    monkeypatch.setitem(gpu.paths.PATHS, "evaluation", path)
    records = gpu.measure.run([], [], Clock(), 8.0, lambda record: None, ["evaluation"])
    assert [(r["state"], r["why"][:18]) for r in records if r["kind"] == "parity"] == [
        ("red", "x: error 2.5e-01, ")
    ] * 3
    assert "parity: 0 of 3 green" in gpu.measure.table(records)


def test_the_table_says_of_every_goal_whether_it_is_reached(gpu):
    """The goals of layer norm: forward 0.85 of a copy, 1.1x and 1x; backward 0.80, 1.8x and 1.8x."""
    row = next(row for row in gpu.rows.ROWS if row.case.norm == "layer")
    assert [goal.part for goal in row.goals] == ["forward", "backward"]
    base = {"kind": "timing", "row": row.name, "state": "measured", "wall_ms": 1.0}

    def ends(eager, **compiled):
        mine = {"forward_ms": 1.0, "backward_ms": 2.0, "of_copy": {"forward": 0.86, "backward": 0.79}}
        records = [{**base, "implementation": "normkit", **mine}]
        records.append({**base, "implementation": "torch", "forward_ms": 1.2, "backward_ms": eager})
        records.append({**base, "implementation": "torch.compile", "forward_ms": 1.0, "backward_ms": 4.0, **compiled})
        return [
            line.partition("  missed")[2] or line.split()[-1] for line in gpu.measure.table(records).splitlines()[1:3]
        ]

    assert ends(3.7) == ["reached", ": copy"]
    assert ends(3.5) == ["reached", ": copy, eager"]
    assert ends(3.7, state="no time") == ["compile", ": copy"]


def test_rows_with_a_goal_come_first_then_models_and_the_other_contenders_last(gpu, monkeypatch):
    with_goal, without = gpu.rows.ROWS[0], next(row for row in gpu.rows.ROWS if not row.goals and not row.brief)
    contenders_of(monkeypatch, gpu, "normkit")
    late = [("torch without cuDNN", lambda: SimpleNamespace(step=lambda given: None))]
    monkeypatch.setattr(gpu.measure, "further", lambda row, given: iter(late))
    monkeypatch.setattr(gpu.measure, "checks", lambda row, device: iter([{"kind": "parity", "state": "green"}]))
    monkeypatch.setattr(gpu.measure.models, "records", lambda name, *_: iter([{"kind": "model", "model": name}]))
    records = gpu.measure.run([without, with_goal], ["resnet50"], Clock(*[1.0] * 4), 8.0, lambda record: None)
    order = [(r.get("row") or r["model"], r.get("implementation")) for r in records if r["kind"] in ("timing", "model")]
    late = "torch without cuDNN"
    assert order == [
        (with_goal.name, "normkit"), ("resnet50", None), ("resnet50", None), (without.name, "normkit"),
        (without.name, late), (with_goal.name, late),
    ]  # fmt: skip


@pytest.mark.slow
def test_parity_is_checked_by_as_many_processes_as_there_are(gpu):
    """Each loads the scripts anew; what they find comes in the order of the tasks."""
    program = (
        "import sys; sys.argv.append('--rehearse'); sys.path.insert(0, sys.argv[1]); import measure\n"
        "if __name__ == '__main__':\n"
        "    row = 'rms_norm 131072x128 bfloat16 contiguous'\n"
        "    tasks = [('parity', row), ('path', 'running')]\n"
        "    found = [(t, [r['state'] for r in rs]) for t, rs in measure.prepared(tasks, 'cpu', 2)]\n"
        "    assert found == [(t, ['green'] * 3) for t in tasks], found\n"
    )
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program, str(GPU)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_would_end_too_late_is_not_begun(gpu, monkeypatch):
    row = gpu.rows.ROWS[0]
    contenders_of(monkeypatch, gpu, "normkit", "torch.compile")
    monkeypatch.setattr(gpu.measure, "checks", lambda row, device: iter([]))
    records = gpu.measure.run([row], [], Clock(2.0), 9 / 60, lambda record: None)
    assert [r["state"] for r in records if r["kind"] == "timing"] == ["measured", "no time"]


def test_a_contender_that_is_not_installed_is_recorded_with_the_reason(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.rms_norm", None)
    row = next(row for row in gpu.rows.ROWS if row.case.norm == "rms")
    from normkit.bench.inputs import inputs

    given = inputs(row.toy.case, row.dtype, row.layout)
    assert [name for name, _ in gpu.contenders.contenders(row.toy, given)] == ["normkit", "torch", "torch.compile"]
    makers = dict(gpu.contenders.further(row.toy, given))
    assert list(makers) == ["Liger", "QuACK", "flash-attention", "torch.compile, autotuned"]
    with pytest.raises(gpu.contenders.Absent, match="liger_kernel"):
        makers["Liger"]()


def test_without_a_gpu_it_says_what_to_do():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, str(GPU / "measure.py")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "rehearse" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_rehearsal_takes_every_path_and_writes_records(tmp_path):
    command = [sys.executable, "-W", "ignore", str(GPU / "measure.py"), "--rehearse", "--out", str(tmp_path)]
    command += ["--minutes", "20"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.rstrip().endswith("a rehearsal: every time above is that of an interpreter on toy shapes")
    records = [json.loads(line) for line in (tmp_path / "timings.jsonl").read_text().splitlines()]
    assert all(record.get("rehearsal") for record in records[1:])
    states = {record["state"] for record in records if record.get("implementation") in ("normkit", "torch")}
    assert states == {"measured"}
    checks = [json.loads(line) for line in (tmp_path / "parity.jsonl").read_text().splitlines()][1:]
    assert {record["state"] for record in checks} == {"green"}
    assert {record["row"] for record in checks} >= {"evaluation", "halves", "compiled", "added"}
    assert nk.dispatch.TRITON.name == "triton"
