"""Records -> page: every number in a table is a number of a record, and what has none says why."""

from __future__ import annotations

import re
import sys

import pytest

from normkit.report import bench_page, html, markdown
from normkit.report import numbers as n
from normkit.vocabulary.record import encode_line


def part(ms: float, **more: object) -> dict[str, object]:
    return {"ms": ms, "low_ms": 0.9 * ms, "high_ms": 1.2 * ms, "passes": 3.1 * ms, **more}


def ratio(value: float) -> dict[str, object]:
    return {"value": value, "low": 0.9 * value, "high": 1.1 * value, "rounds": 9}


def measured(implementation: str, step: float, speedup: float | None = None, **changes: object) -> dict[str, object]:
    more = {}
    if speedup is not None:
        more = {"speedup": ratio(speedup), "extra_us": {"value": 5.25, "low": -1.5, "high": 7.0, "rounds": 9}}
    return {
        "kind": "op",
        "op": "batch_norm+relu",
        "shape": [32, 64, 56, 56],
        "dtype": "float32",
        "layout": "contiguous",
        "device": "cpu",
        "floor_passes": {"forward": 2, "step": 5},
        "reason": "ResNet-50",
        "implementation": implementation,
        "backend": "torch" if implementation == "normkit" else None,
        "state": "measured",
        "allocator": "default",
        "threads": 2,
        "parity": {"y": {"error": 1e-7, "limit": 8e-6}, "x": {"error": 3e-6, "limit": 9e-6}},
        "rounds": 9,
        "preempted": 2,
        "quiet": True,
        "faults": 12.0,
        "peak_mb": 51.25,
        "forward": part(step / 3, **more),
        "step": part(step, **more),
        **changes,
    }


ENVIRONMENT = {"kind": "environment", "schema": 1, "command": "normkit bench --op x", "torch": "2.13.0", "cores": 2}
RECORDS = [
    ENVIRONMENT,
    measured("torch", 7.654),
    measured("normkit", 2.345, 3.264),
    measured("torch.compile", 5.5, 1.391),
    measured("copy", 0.9) | {"step": None, "parity": None},
    measured("torch", 9.87, shape=[8, 8, 4, 4], quiet=False),
    {**measured("normkit", 1.0, shape=[8, 8, 4, 4]), "state": "refused", "why": "parity is red: y"},
    {**measured("torch.compile", 1.0, shape=[8, 8, 4, 4]), "state": "skipped", "why": "no compiler"},
    measured("torch", 4.4, allocator="pinned"),
    measured("normkit", 2.2, 2.0, allocator="pinned"),
]
for record in RECORDS:
    for key in ("step", "parity", "forward"):
        if record.get(key, 0) is None or (key != "parity" and record.get("state") in ("refused", "skipped")):
            record.pop(key, None)


def cells(caption: str) -> dict[tuple[str, str], str]:
    """(shape, column) -> text of one table."""
    table = next(table for table in bench_page.tables(RECORDS) if table.caption == caption)
    return {(row[1], name): text for row in table.rows for name, text in zip(table.header, row, strict=True)}


def test_the_numbers_of_the_table_are_those_of_the_records():
    table = cells("forward and backward, default allocator")
    shape = "32x64x56x56"
    assert table[shape, "torch, ms"] == n.significant(RECORDS[1]["step"]["ms"]) == "7.65"
    assert table[shape, "passes"] == n.significant(RECORDS[1]["step"]["passes"], 2)
    assert table[shape, "floor"] == "5"
    for record in RECORDS[2:4]:
        speedup = record["step"]["speedup"]
        told = [float(number) for number in re.findall(r"[\d.]+", table[shape, record["implementation"]])]
        assert told == pytest.approx([speedup["value"], speedup["low"], speedup["high"]], rel=0.02)
    assert cells("forward, default allocator")[shape, "torch, ms"] == n.significant(RECORDS[1]["forward"]["ms"])
    assert cells("forward and backward, pinned allocator")[shape, "normkit"] == "2.0× [1.80, 2.2]"


def test_red_skipped_and_busy_cells_say_so():
    table = cells("forward and backward, default allocator")
    assert table["8x8x4x4", "normkit"] == "red"
    assert table["8x8x4x4", "torch.compile"] == n.NOTHING
    assert table["8x8x4x4", "torch, ms"] == "~9.87"
    page = markdown.render(bench_page.document(RECORDS))
    assert "refused: parity is red: y" in page
    assert "skipped: no compiler" in page


def test_the_answer_is_the_geometric_mean_and_counts_what_is_missing():
    answer = bench_page.answer(RECORDS)
    assert answer.startswith("normkit is 3.3× as fast as torch's own layers (geometric mean over 1 cells")
    assert "1 measurements have no number" in answer
    assert "default allocator" in answer


def test_no_verdict_from_a_busy_machine():
    busy = [{**record, "quiet": False} if "quiet" in record else record for record in RECORDS]
    assert bench_page.answer(busy).startswith("no evidence, the machine was busy")


def test_nothing_measured_is_said():
    assert bench_page.answer([ENVIRONMENT]) == "nothing could be timed"
    assert bench_page.tables([ENVIRONMENT]) == []
    assert "nothing could be timed" in markdown.render(bench_page.document([ENVIRONMENT]))


def test_overhead_is_told_per_call():
    tiny = measured("normkit", 0.02, 0.8, kind="overhead", op="layer_norm", reason="tiny", shape=[8, 64])
    large = measured("normkit", 1.0, 0.98, kind="overhead", op="layer_norm", reason="1 MB", shape=[4096, 64])
    records = [ENVIRONMENT, tiny, large]
    assert "costs +5.2 to +5.2 µs per call on a tiny tensor, +2.0 % to +2.0 % on 1 MB and 4 MB" in bench_page.answer(
        records
    )
    (table,) = bench_page.tables(records)
    assert table.rows[0] == [
        "layer_norm",
        "tiny, 8x64",
        "normkit (torch)",
        "+5.2 µs [−1.5, +7.0]",
        "+25.0 %",
        "+5.2 µs [−1.5, +7.0]",
        "+25.0 %",
    ]


def test_models_have_their_own_table():
    records = [
        measured("torch", 800.0, kind="model", op="resnet50", shape=[]),
        measured("normkit", 640.0, 1.25, kind="model", op="resnet50", shape=[]),
    ]
    for record in records:
        del record["backend"]  # a model is no single call
    both, forward = bench_page.tables(records)
    assert "1.25×" in markdown.render(bench_page.document(records))
    assert both.rows == [["resnet50", "", "float32", "contiguous", "800", "1.25× [1.12, 1.38]"]]
    assert forward.caption == "forward, default allocator"
    assert "as fast as the plain model (geometric mean over 1 models" in bench_page.answer(records)


def test_the_page_and_its_twin_hold_every_measurement(tmp_path):
    (tmp_path / "bench.jsonl").write_bytes(b"".join(map(encode_line, RECORDS)))
    page = bench_page.write(tmp_path)
    assert page == tmp_path / "report.html"
    html_text, markdown_text = page.read_text(), (tmp_path / "report.md").read_text()
    for text in (html_text, markdown_text):
        for told in ("7.65", "2.35 (2.11 to 2.81)", "51.2", "3.0e-06 / 9.0e-06", "normkit bench --op x", "2.13.0"):
            assert told in text
    assert html_text.count("<svg") == 1
    assert html_text == html.render(bench_page.document(RECORDS))  # the same records, the same bytes


def test_the_picture_is_a_file_that_stands_by_itself(tmp_path):
    (tmp_path / "bench.jsonl").write_bytes(b"".join(encode_line(r) for r in RECORDS))
    drawn = bench_page.picture(tmp_path, tmp_path / "speed.svg")
    assert drawn.read_text().startswith("<?xml")
    with pytest.raises(ValueError, match=r"written as \.png or \.svg"):
        bench_page.picture(tmp_path, tmp_path / "speed.gif")


def test_without_a_plotting_library_the_page_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "normkit.report.plots.speeds", None)
    page = html.render(bench_page.document(RECORDS))
    assert "matplotlib is not installed" in page
    assert "<svg" not in page


def test_memory_is_told_in_megabytes_and_against_torch():
    errors = {"input": 2e-7, "parameters": 3e-7}
    kept = {"torch": 20.0, "torch out of place": 28.0, "normkit": 19.0, 'normkit, save="output"': 10.0}
    records = [
        {**measured(name, 8.0, kind="memory", op="chain", shape=[8, 64]), "saved_mb": mb, "gradient_error": errors}
        for name, mb in kept.items()
    ]
    told = bench_page.answer(records)
    assert 'torch out of place +40.0 %, normkit −5.0 %, normkit, save="output" −50.0 %' in told
    (table,) = (t for t in bench_page.tables(records) if t.caption.startswith("kept"))
    assert table.rows[-1][3:] == ['normkit, save="output"', "10.00", "50.0 %", "2.0e-07", "3.0e-07"]
