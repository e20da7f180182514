"""What is asked beside what was measured, on records made by hand."""

from __future__ import annotations

from normkit.report import bench_goals


def record(op, shape, ratio=None, **other):
    step = {"ms": 1.0} if ratio is None else {"ms": 1.0, "speedup": {"value": ratio}}
    return {
        "kind": "op",
        "state": "measured",
        "allocator": "pinned",
        "op": op,
        "dtype": "float32",
        "layout": "contiguous",
        "shape": shape,
        "reason": "ResNet-50, stage 1",
        "tensor_mb": 8.0,
        "implementation": "torch" if ratio is None else "normkit",
        "step": step,
        **other,
    }


def both(op, shape, ratio, **other):
    return [record(op, shape, **other), record(op, shape, ratio, **other)]


def goal(found, what, layout="contiguous"):
    return [row for row in found.rows if row[0].startswith(what) and row[1] == layout]


def test_a_goal_is_reached_by_the_mean_over_its_shapes_of_the_median_over_runs():
    runs = [
        [*both("batch_norm+relu", [1], first), *both("batch_norm+add+relu", [2], 3.0, dtype="bfloat16")]
        for first in (2.0, 2.5, 9.0)
    ]
    (row,) = goal(bench_goals.table(runs), "batch norm, ReLU")
    assert row == [row[0], "contiguous", "2.2×", "2.5×", "3.0×", "yes"]
    runs[2] = runs[0]
    (row,) = goal(bench_goals.table(runs), "batch norm, ReLU")
    assert row[3:] == ["2.0×", "3.0×", "no"]  # one type is enough to miss it


def test_where_a_goal_names_no_type_the_mean_is_over_the_cells_of_both():
    run = [*both("batch_norm", [1], 1.6), *both("batch_norm", [1], 2.5, dtype="bfloat16")]
    assert goal(bench_goals.table([run]), "batch norm; ResNet-50")[0][3:] == ["1.60×", "2.5×", "yes"]


def test_only_the_shapes_count_that_a_goal_speaks_of():
    run = [
        *both("batch_norm", [32, 64, 56, 56], 2.0),
        *both("batch_norm", [60, 100], 0.1, reason="small"),
        *both("rms_norm", [64, 768], 6.0),
        *both("rms_norm", [1, 768], 0.1, tensor_mb=0.01),
        *both("instance_norm", [1], 9.0, allocator="default"),
        {"kind": "op", "op": "batch_norm", "dtype": "float32", "layout": "contiguous", "shape": [1], "state": "failed"},
    ]
    found = bench_goals.table([run])
    assert goal(found, "batch norm; ResNet-50")[0][3:] == ["2.0×", "–", "yes"]
    assert [row[3:] for row in goal(found, "RMS norm")] == [["6.0×", "–", "yes"], ["–", "–", "–"]]
    assert goal(found, "instance norm")[0][5] == "–"
    assert bench_goals.slower([run]) == [
        "batch_norm 60x100 float32 contiguous 0.10×",
        "rms_norm 1x768 float32 contiguous 0.10×",
    ]


def test_beside_a_compiled_layer_the_same_shapes_count_with_goals_of_their_own():
    def compiled(shape, ratio, **other):
        return {**record("batch_norm", shape, ratio, **other), "implementation": "torch.compile"}

    run = [*both("batch_norm", [1], 3.0), compiled([1], 2.0), *both("batch_norm", [2], 3.0)]
    run += [compiled([2], 1.0, state="refused")]  # a wrong result is no peer
    found = bench_goals.table([run], compiled=True)
    assert goal(found, "batch norm; ResNet-50")[0][2:] == ["1.30×", "1.50×", "–", "yes"]
    assert not goal(found, "batch norm, ReLU")
