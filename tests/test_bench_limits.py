"""The table of where the kernels take over, on records made by hand."""

from __future__ import annotations

from normkit.report.bench_limits import table


def pair(shape, torchs, ours, chosen, **other):
    """The layer by both of its backends in one cell; dispatch took ``chosen``."""
    for backend, ms in (("torch", torchs), ("native", ours)):
        name = "normkit" if backend == chosen else f"normkit:{backend}"
        yield {
            "kind": "op", "state": "measured", "allocator": "pinned", "op": "layer_norm", "dtype": "float32",
            "layout": "contiguous", "shape": shape, "implementation": name, "backend": backend, "step": {"ms": ms},
            **other,
        }  # fmt: skip


def test_a_cell_is_the_median_over_runs_and_leans_where_torchs_operators_run():
    runs = [
        [
            *pair([64, 256], 1.0, ours, "torch"),
            *pair([4096, 256], 3.0, ours, "native"),
            *pair([64, 128], 1, 1, "native"),
        ]
        for ours in (2.0, 1.0, 4.0)
    ]
    found = table(runs)
    assert found.header == ["op", "type", "layout", "rows of", "8 k", "16 k", "1.0 M"]
    assert found.rows == [
        ["layer_norm", "float32", "contiguous", "256", "–", "*0.50×*", "1.50×"],
        ["layer_norm", "float32", "contiguous", "128", "1.00×", "–", "–"],
    ]


def test_what_was_measured_by_one_alone_or_with_another_allocator_has_no_cell():
    alone = [next(iter(pair([8, 8], 1.0, 1.0, "torch")))]
    elsewhere = [
        *pair([8, 8], 1.0, 1.0, "torch", allocator="default"),
        *pair([8, 8], 1.0, 1.0, "torch", state="refused"),
    ]
    assert table([alone, elsewhere]).rows == []
