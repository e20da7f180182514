"""The small table of several benchmark runs, on records made by hand with a known answer."""

from __future__ import annotations

import pytest

from normkit.report.bench_summary import models, newest, passes, repeats, speedups, table


def record(shape, implementation, ratio=None, **other):
    step = {"ms": 1.0} if ratio is None else {"ms": 1.0, "speedup": {"value": ratio}}
    return {
        "kind": "op",
        "state": "measured",
        "allocator": "default",
        "op": "batch_norm+relu",
        "dtype": "float32",
        "layout": "contiguous",
        "shape": shape,
        "implementation": implementation,
        "step": step,
        **other,
    }


def run(*ratios):
    """Shapes (1,), (2,) ... with normkit so many times as fast, and torch.compile twice as fast as torch."""
    records = []
    for index, ratio in enumerate(ratios, start=1):
        records += [record([index], "torch"), record([index], "torch.compile", 2.0), record([index], "normkit", ratio)]
        copied = record([index], "copy")
        del copied["step"]  # the yardstick has no backward pass
        records.append(copied)
    return records


def test_a_cell_is_the_geometric_mean_over_shapes_of_the_median_over_runs():
    runs = [run(2.0, 7.0), run(1.0, 8.0), run(50.0, 9.0)]  # medians 2 and 8, geometric mean 4
    (row,) = table(runs, "default").rows
    assert row[:2] == ["batch_norm+relu", "4.0× (2.0 to 8.0)"]
    assert row[2:] == ["–"] * 3


def test_another_implementation_is_compared_within_the_same_run():
    assert speedups([run(2.0, 8.0)], "default", "torch.compile") == {
        ("batch_norm+relu", "float32", "contiguous", (1,)): pytest.approx(1.0),
        ("batch_norm+relu", "float32", "contiguous", (2,)): pytest.approx(4.0),
    }


@pytest.mark.parametrize("other", [{"state": "refused"}, {"allocator": "pinned"}, {"kind": "model"}])
def test_what_was_refused_or_measured_otherwise_is_not_in_it(other):
    assert speedups([[record([1], "torch"), record([1], "normkit", 3.0, **other)]], "default") == {}


def test_passes_stand_beside_the_floor_for_large_tensors_only():
    def passing(megabytes, torchs, ours):
        floor = {"tensor_mb": megabytes, "floor_passes": {"forward": 2, "step": 5}}
        for implementation, count in (("torch", torchs), ("normkit", ours)):
            part = {"ms": 1.0, "passes": count}
            yield record([int(megabytes)], implementation, **floor) | {"forward": part, "step": part}

    runs = [[*passing(8, 12.0, 4.0), *passing(16, 14.0, 6.0), *passing(1, 99.0, 99.0)]]
    assert passes(runs, "default").rows == [["batch_norm+relu", "2", "13", "5.0", "5", "13", "5.0"]]


def test_models_have_the_median_of_their_runs_and_no_column_for_what_nobody_timed():
    def model(implementation, ms, ratio=None, **other):
        made = record([], implementation, ratio, op="resnet50", kind="model", allocator="pinned", **other)
        return {**made, "step": {**made["step"], "ms": ms}}

    runs = [[model("torch", ms), model("normkit", 1.0, r)] for ms, r in ((100.0, 1.1), (90.0, 1.3), (80.0, 1.2))]
    other = [
        record([1], "torch"),
        model("normkit", 1.0, 9.0, state="refused"),
        {**model("torch", 1.0), "allocator": "default"},
    ]
    found = models([*runs, other], "pinned", "~")
    assert found.header[3:] == ["torch, ms", "`accelerate_`"]
    assert found.rows == [["resnet50", "float32", "contiguous", "90.0", "1.20×"]]
    runs[0][1]["quiet"] = False
    assert models(runs, "pinned", "~").rows[0][3:] == ["~90.0", "~1.20×"]


def test_what_a_later_commit_has_measured_again_replaces_what_was():
    def at(commit, created, records):
        return [{"kind": "environment", "commit": commit, "created": f"2026-11-27T{created}"}, *records]

    old, again = run(2.0, 3.0), run(5.0)
    runs = [at("b", "05:00", again), at("a", "03:00", old), at("a", "04:00", old)]
    kept = newest(runs)
    assert [len(records) for records in kept] == [5, 5, 5]  # shape (1,) of the new commit, shape (2,) of the old one
    found = speedups(kept, "default")
    assert {shape: ratio for (_, _, _, shape), ratio in found.items()} == {(1,): 5.0, (2,): 3.0}
    pinned = [r | {"allocator": "pinned"} if r["kind"] == "op" else r for r in runs[0]]
    assert newest([pinned, runs[1]]) == [pinned, runs[1]]
    assert repeats(kept, "default", "torch.compile") == 1
