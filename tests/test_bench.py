"""The benchmark: what a cell records and refuses, what is planned, and that a run survives. No time is asserted."""

from __future__ import annotations

import math
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench_cases import BRIEF, EVERY_OP, name_of
from normkit.bench import cases, cell, memory, models, parity, peers, plan, watched
from normkit.bench.allocator import peak_megabytes
from normkit.bench.cases import CASES, Case
from normkit.bench.cell import COPY, measure
from normkit.bench.clock import LEAST_ROUNDS, Step
from normkit.bench.inputs import inputs
from normkit.bench.overhead import SIZES
from normkit.bench.run import FILE, run
from normkit.bench.worker import carry_out
from normkit.dispatch import BACKENDS, Backend
from normkit.epilogue import apply
from normkit.vocabulary.record import read_lines


@pytest.fixture
def wrong_backend(monkeypatch):
    """A backend that is fast and wrong."""
    backend = Backend(
        "wrong", lambda call: [], lambda call: apply(call.by_torch() * 1.05, call.residual, call.activation)
    )
    monkeypatch.setitem(BACKENDS, "wrong", backend)
    return backend


def test_a_wrong_backend_gets_no_number(wrong_backend):
    effort = replace(BRIEF, wanted=("normkit", "normkit:wrong"))
    records = {
        r["implementation"]: r for r in measure(Case("batch", (6, 8, 5, 5), ""), "float32", "contiguous", effort)
    }
    refused = records["normkit:wrong"]
    assert refused["state"] == "refused"
    assert refused["why"].startswith("parity is red, so it is not timed: y: error 5.0e-02")
    assert {"forward", "step", "peak_mb"}.isdisjoint(refused)
    assert records["normkit"]["state"] == records["torch"]["state"] == "measured"
    assert "step" in records["normkit"]


def test_a_backend_that_declines_is_skipped_with_its_reasons(monkeypatch):
    picky = Backend("picky", lambda call: ["it takes no such thing"], lambda call: call.by_torch())
    monkeypatch.setitem(BACKENDS, "picky", picky)
    effort = replace(BRIEF, wanted=("normkit:picky",))
    records = measure(Case("layer", (6, 8), "", features_last=True), "float32", "contiguous", effort)
    skipped = next(r for r in records if r["implementation"] == "normkit:picky")
    assert skipped["state"] == "skipped"
    assert "picky: it takes no such thing" in skipped["why"]


def test_torch_is_timed_with_its_own_error_and_nobody_may_exceed_it():
    far, near = parity.Agreement(0.04, 0.01), parity.Agreement(0.001, 0.01)
    assert parity.objection({"y": near}) is None
    assert parity.objection({"y": far}) == "y: error 4.0e-02, may be 1.0e-02"
    assert parity.objection({"y": far}, {"y": far}) is None
    assert parity.objection({"y": parity.Agreement(0.07, 0.01)}, {"y": far}) is not None
    assert parity.objection({"y": far}, {"y": near}) is not None
    assert (
        parity.objection({"y": parity.Agreement(math.nan, 0.01)}, {"y": parity.Agreement(math.nan, 0.01)}) is not None
    )


@pytest.mark.parametrize("case", EVERY_OP, ids=name_of)
def test_records_of_a_cell_hold_what_the_page_needs(case):
    records = {
        r["implementation"]: r for r in measure(case, "float32", "contiguous", replace(BRIEF, wanted=("normkit",)))
    }
    assert set(records) == {"torch", "normkit", COPY}
    for name, record in records.items():
        assert record["kind"] == "op"
        assert (record["op"], record["shape"], record["state"]) == (case.op, list(case.shape), "measured")
        assert record["forward"]["low_ms"] <= record["forward"]["ms"] <= record["forward"]["high_ms"]
        assert len(record["forward"]["samples_ms"]) == record["rounds"] >= LEAST_ROUNDS
        assert ("step" in record) == ("parity" in record) == ("peak_mb" in record) == (name != COPY)
    assert records["normkit"]["backend"] in BACKENDS
    ratio = records["normkit"]["step"]["speedup"]["value"]
    pairs = zip(records["torch"]["step"]["samples_ms"], records["normkit"]["step"]["samples_ms"], strict=True)
    assert ratio == pytest.approx(math.exp(statistics.median(math.log(t / n) for t, n in pairs)), rel=1e-3)


def test_a_cell_that_does_not_fit_into_memory_is_skipped(monkeypatch):
    monkeypatch.setattr(cell, "available_bytes", lambda: 10**6)
    (record,) = measure(Case("batch", (1000, 1000), ""), "float32", "contiguous", BRIEF)
    assert record["state"] == "skipped"
    assert "needs about" in record["why"]


def test_a_peer_that_compiles_again_while_it_is_timed_is_skipped():
    sizes = iter(range(1, 1000))
    compiled = torch.compile(lambda x: x * 2, backend="eager", dynamic=False)
    compiled(torch.ones(1))
    restless = Step(lambda: compiled(torch.ones(next(sizes) * 3)), lambda y: None)
    told = cell.time_steps({"torch": Step(lambda: torch.ones(3), lambda y: None), "torch.compile": restless}, BRIEF)
    torch.compiler.reset()
    assert told["torch.compile"]["state"] == "skipped"
    assert "recompil" in told["torch.compile"]["why"]
    assert "step" in told["torch"]


def test_a_steady_compiled_peer_is_timed():
    case = Case("batch", (4, 8, 5, 5), "", activation="relu")
    given = inputs(case, "float32", "contiguous")
    plain = peers.eager(case, torch.float32, in_place=False)
    steady = replace(plain, call=torch.compile(plain.call, backend="aot_eager", fullgraph=True, dynamic=False))
    assert parity.objection(parity.check(steady, given, parity.truth(case, given, torch.float32))) is None
    told = cell.time_steps({"torch.compile": steady.step(given)}, BRIEF)
    torch.compiler.reset()
    assert told["torch.compile"]["rounds"] >= LEAST_ROUNDS


# cases and plans


def test_every_case_has_a_layer_a_reason_and_a_floor():
    for case in CASES:
        assert case.reason
        assert len({case.op, *case.op.split("+")}) > len(case.op.split("+")) - 1
        forward, step = case.floor()
        assert 2 <= forward < step
        assert case.channels == case.shape[-1 if case.features_last else 1]
    assert len(set(CASES)) == len(CASES)


@pytest.mark.parametrize("case", {(c.norm, c.op, c.dim): c for c in CASES + SIZES}.values(), ids=name_of)
def test_the_peers_of_a_case_hold_the_same_parameters(case):
    own, torchs = peers.layer(case, torch.float32), peers.eager(case, torch.float32)
    mine = dict(own.named_parameters())
    assert mine
    for name, parameter in torchs.layer.named_parameters():
        assert torch.equal(parameter, mine[name])
        assert not torch.equal(parameter, parameter.round())  # neither one nor zero


@pytest.mark.parametrize(
    ("case", "streamed", "floor"),
    [
        (Case("batch", (8, 8, 8, 8), ""), False, (2, 5)),
        (Case("batch", (8, 8, 8, 8), ""), True, (3, 8)),
        (Case("batch", (8, 8, 8, 8), "", activation="relu", residual=True), False, (3, 7)),
        (Case("batch", (8, 8, 8, 8), "", activation="relu", residual=True), True, (4, 10)),
        (Case("group:4", (8, 8, 8, 8), "", activation="silu"), True, (2, 5)),
        (Case("rms", (8, 8), "", residual=True, features_last=True), False, (3, 6)),
    ],
)
def test_floors(case, streamed, floor):
    """background: read x (and the residual) once and write once; backward reads two and writes one (or two)."""
    assert case.floor(streamed) == floor


def test_the_floors_of_the_documentation_are_those_of_the_cases():
    page = (Path(__file__).parent.parent / "docs" / "benchmarks.md").read_text().partition("<!-- passes:begin -->")[0]
    ops = {case.op: case for case in CASES}
    rows = [re.findall(r"[^|\s]+", line) for line in page.splitlines() if line.startswith("| ")]
    told = {row[0]: row[1:5] for row in rows if row and row[0] in ops and row[1:5] and row[1].isdigit()}
    assert len(told) == 8
    for op, (forward, streamed_forward, step, streamed_step) in told.items():
        assert (int(forward), int(step)) == ops[op].floor(), op
        assert (int(streamed_forward), int(streamed_step)) == ops[op].floor(streamed=True), op


def test_levels_and_patterns_choose_cases():
    assert all(case.level == "quick" for case in cases.choose("quick"))
    assert {case.level for case in cases.choose("default")} == {"default"}
    assert {case.level for case in cases.choose("thorough")} == {"default", "thorough"}
    assert {case.op for case in cases.choose("default", ["batch_norm*"])} == {
        "batch_norm",
        "batch_norm+relu",
        "batch_norm+add+relu",
    }
    (smallest,) = cases.choose("quick", ["dyt"])
    assert smallest.shape == (64, 197, 768)


def test_a_shape_of_ones_own_becomes_a_case_and_a_known_one_keeps_its_reason():
    (own,) = cases.choose("default", ["group_norm+silu"], [(3, 96, 10, 10)])
    assert (own.shape, own.reason) == ((3, 96, 10, 10), "asked for on the command line")
    (known,) = cases.choose("default", ["group_norm+silu"], [(2, 320, 64, 64)])
    assert known.reason == "U-Net of latent diffusion"


@pytest.mark.parametrize(
    ("ops", "shape"), [(["group_norm+silu"], (2, 33, 8, 8)), (["instance_norm"], (4, 8)), (["conv"], None)]
)
def test_what_cannot_be_timed_is_refused(ops, shape):
    with pytest.raises(ValueError, match=r"group norm needs|choose from"):
        cases.choose("default", ops, [shape] if shape else [])


def test_rows_have_one_layout_and_images_two():
    planned = plan.tasks("default", ["batch_norm", "rms_norm"], dtypes=["float32"])
    seen = {(task["case"]["norm"], len(task["case"]["shape"]), task["layout"]) for task in planned}
    assert ("batch", 4, "channels_last") in seen
    assert ("batch", 2, "channels_last") not in seen
    assert ("rms", 2, "contiguous") in seen
    with pytest.raises(ValueError, match="channels_last is a layout of images"):
        plan.tasks("default", ["rms_norm"], layouts=["channels_last"])


def test_overhead_and_models_are_asked_for_by_name():
    assert {task["kind"] for task in plan.tasks("default")} == {"op"}
    overhead = plan.tasks("default", ["overhead"])
    assert len(overhead) == len(SIZES)
    assert all(task["overhead"] for task in overhead)
    for case in SIZES:
        size = case.size("float32") / 2**20
        assert {"tiny": size < 0.01, "1 MB": 0.95 < size < 1.05, "4 MB": 3.8 < size < 4.2}[case.reason]
    forms = [(task["model"], task["layout"]) for task in plan.tasks("default", ["models"], dtypes=["float32"])]
    assert forms == [(model, form) for model, setting in models.MODELS.items() for form in setting.layouts]
    assert ("resnet50", "channels_last") in forms
    assert [task["dtype"] for task in plan.tasks("default", ["unet"])] == 2 * ["float32"] + 2 * ["bfloat16"]


def test_memory_is_asked_for_by_name_and_tells_bytes_errors_and_times(monkeypatch):
    monkeypatch.setattr(memory, "SHAPE", (16, 16, 24, 24))  # large enough for a kernel
    monkeypatch.setattr(memory, "BLOCKS", 3)
    (task,) = plan.tasks("default", ["memory"], dtypes=["float32"])
    assert [t["dtype"] for t in plan.tasks("default", ["memory"])] == ["float32", "bfloat16"]
    records = {r["implementation"]: r for r in carry_out(task, replace(BRIEF, wanted=()), "cpu")}
    assert list(records) == list(memory.VARIANTS)
    tensor = 16 * 16 * 24 * 24 * 4 / 1e6
    kept = {name: round(r["saved_mb"] / tensor) for name, r in records.items()}  # the rest is one number per channel
    assert kept == {"torch": 6, "torch out of place": 8, "normkit": 5, memory.OUTPUT: 3}
    for record in records.values():
        assert (record["kind"], record["op"], record["shape"]) == ("memory", memory.OP, [16, 16, 24, 24])
        assert all(0 < error < 1e-5 for error in record["gradient_error"].values())
        assert record["rounds"] >= LEAST_ROUNDS


# memory, and the run as a whole


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_what_a_step_takes_beyond_what_is_there():
    kept = bytearray(b"x" * 20_000_000)
    assert peak_megabytes(lambda: bytearray(b"x" * 24_000_000)) == pytest.approx(48, abs=3)  # the bytes and their copy
    assert peak_megabytes(lambda: None) < 2
    assert len(kept) == 20_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_counts_what_the_allocator_had_kept():
    blocks, above = [bytearray(100_000) for _ in range(200)], bytearray(100_000)
    del blocks  # the one above them keeps the heap from shrinking
    assert peak_megabytes(lambda: [bytearray(100_000) for _ in range(200)]) == pytest.approx(20, abs=3)
    assert len(above) == 100_000


FAULTS = """
import resource, sys
from normkit.bench.allocator import pin
assert sys.argv[1] == "default" or pin()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    before = faults(); memory = bytearray(64_000_000); del memory
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_a_pinned_allocator_keeps_the_pages_that_the_default_gives_back():
    found = {}
    for allocator in ("default", "pinned"):
        command = [sys.executable, "-c", FAULTS, allocator]
        found[allocator] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["pinned"] < found["default"] / 4


@pytest.mark.slow
def test_a_run_writes_what_it_returns_and_survives_a_task_that_dies(tmp_path):
    good = plan.tasks("quick", ["layer_norm"], [(6, 16)])
    dies = [
        {**good[0], "case": {**good[0]["case"], "norm": "group:32", "shape": [2, 33, 4, 4], "features_last": False}}
    ]
    dies[0]["case"]["norm"] = "group:33"  # a case that has 33 groups, and a layer that divides by
    dies[0]["case"]["shape"] = [2, 34, 4, 4]
    begun = []
    effort = replace(BRIEF, wanted=("normkit",))
    records = run(
        plan.Plan([*good, *dies, *good], effort, ("default",), 1),
        tmp_path,
        {"torch": torch.__version__},
        lambda allocator, task: begun.append((allocator, task["case"]["norm"])),
    )
    assert read_lines(tmp_path / FILE) == records
    assert begun == [("default", norm) for norm in ("layer", "group:33", "layer")]
    assert records[0] == {"kind": "environment", "schema": 1, "torch": torch.__version__}
    states = [(r["implementation"], r["state"]) for r in records[1:]]
    measured = [("torch", "measured"), ("normkit", "measured"), (COPY, "measured")]
    assert states == [*measured, ("torch", "failed"), *measured]
    failed = records[4]
    assert "divide" in failed["why"] or "divis" in failed["why"]
    assert failed["shape"] == [2, 34, 4, 4]
    assert {(r["allocator"], r["threads"]) for r in records[1:]} == {("default", 1)}


def test_a_run_that_cannot_begin_says_why(tmp_path):
    planned = plan.Plan(plan.tasks("quick", ["layer_norm"], [(6, 16)]), BRIEF, ("default",), threads=-1)
    with pytest.raises(RuntimeError, match="ended before it began"):
        run(planned, tmp_path, {})


@pytest.mark.slow
def test_watching_is_timed_between_samples_and_at_them(monkeypatch):
    small = lambda: models.Transformer(layers=1, width=32, heads=2)
    batch = lambda: models._bytes(2, 16)
    monkeypatch.setitem(models.MODELS, "transformer", models.Setting(small, batch, models._per_symbol, "small"))
    assert [t["model"] for t in plan.tasks("default", ["watch"])] == ["resnet50", "transformer"]
    assert [t["model"] for t in plan.tasks("default", ["watch_transformer"])] == ["transformer"]
    records = {r["implementation"]: r for r in watched.measure("transformer", "float32", BRIEF)}
    assert list(records) == list(watched.VARIANTS)
    assert all(r["state"] == "measured" and r["identical"] for r in records.values())
    cost = records[watched.SAMPLED]["watch"]
    assert cost["interval"] >= 50
    own = max(0, cost["between_ms"]) * (cost["interval"] - 1) + max(0, cost["sample_ms"])
    assert cost["share"] == pytest.approx(own / (cost["interval"] * records["torch"]["step"]["ms"]))


def test_a_watch_that_changes_the_run_is_not_timed(monkeypatch):
    monkeypatch.setattr(watched, "different", lambda *_: ["embed.weight"])
    (record,) = watched.measure("transformer", "float32", BRIEF)
    assert record["state"] == "refused"
    assert "embed.weight" in record["why"]
