"""Recurrent and Transformer layers in the benchmark: held against another way to write them, timed, and told."""

from __future__ import annotations

import pytest
import torch

import normkit as nk
from bench_cases import BRIEF
from normkit.bench import blocks, plan
from normkit.bench.worker import carry_out
from normkit.report import bench_blocks, bench_page, markdown

SIZES = {"STEPS": 4, "SAMPLES": 6, "UNITS": 8, "TOKENS": 6, "BATCH": 3, "WIDTH": 8, "HEADS": 2, "INNER": 16}
QUICK = (
    "LSTM batch:per_step:64",
    "TransformerEncoderLayer batch+ffn:batch",
    "TransformerEncoderLayer layer evaluation",
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, size in SIZES.items():
        monkeypatch.setattr(blocks, name, size)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in blocks.BLOCKS])
def test_a_block_agrees_with_another_way_to_write_it_and_is_timed(name):
    (task,) = [task for task in plan.tasks("default", ["blocks"]) if task["block"] == name]
    records = carry_out(task, BRIEF, "cpu")
    fast = [blocks.SLOW_PATH] if name.endswith("layer evaluation") else []
    assert [r["implementation"] for r in records] == ["torch", "normkit", *fast]
    assert all(r["state"] == "measured" and r["op"] == name and r["step"]["ms"] > 0 for r in records)
    parity = records[1]["parity"]
    assert set(parity) == ({"y"} if name.endswith("evaluation") else {"y", "gradients"})
    assert all(0 < one["error"] <= one["limit"] < 1e-4 for one in parity.values())


@pytest.mark.parametrize(
    ("name", "kind"), [("LSTM rms", nk.RMSNorm), ("TransformerDecoderLayer batch", nk.BatchNorm1d)]
)
def test_a_block_that_is_wrong_is_not_timed(monkeypatch, name, kind):
    right = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x, **more: 1.01 * right(self, x, **more))
    (record,) = blocks.measure(name, BRIEF)
    assert record["state"] == "refused"
    assert "nothing is timed" in record["why"]
    assert "step" not in record


def test_gradients_of_all_parameters_are_compared():
    peers, truth = blocks._peers(blocks.BLOCKS["TransformerEncoderLayer batch+ffn:batch"], "cpu")
    own = peers["normkit"]
    values = sum(p.numel() for p in own.block.parameters()) + own.given[0].numel()
    assert truth.results()["gradients"].shape == own.results()["gradients"].shape == (values,)
    assert torch.allclose(truth.results()["gradients"], own.results()["gradients"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("norm", "runs"), [("layer", {"torch": 1, "normkit": 0, blocks.SLOW_PATH: 0}), ("rms", {})])
def test_only_torchs_layer_norm_takes_the_fast_path(monkeypatch, norm, runs):
    peers, _ = blocks._peers(blocks.BLOCKS[f"TransformerEncoderLayer {norm} evaluation"], "cpu")
    kernel, taken = torch._transformer_encoder_layer_fwd, []
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: (taken.append(1), kernel(*args))[1])
    for name, peer in peers.items():
        taken.clear()
        peer.forward()
        assert len(taken) == runs.get(name, 0)
        assert peer.fast_path == (len(taken) == 1)


def test_blocks_are_asked_for_by_name_and_in_float32():
    names = lambda *ops: [task["block"] for task in plan.tasks("default", ops)]
    assert names("recurrent", "transformer_layer") == names("blocks") == list(blocks.BLOCKS)
    assert all(name.startswith("LSTM") for name in names("recurrent"))
    with pytest.raises(ValueError, match="blocks are timed in float32, not in bfloat16"):
        plan.tasks("default", ["blocks"], dtypes=["bfloat16"])


def record(op: str, implementation: str, ms: float, limit: float | None = None, **more: object) -> dict:
    layer, norm, *mode = op.split()
    ratio = {"speedup": {"value": 10 / ms, "low": 9 / ms, "high": 11 / ms}} if implementation != "torch" else {}
    times = {"ms": ms, "low_ms": ms, "high_ms": ms, **ratio}
    about = {"kind": "block", "op": op, "layer": layer, "norm": norm, "training": not mode, "dtype": "float32"}
    return {**about, "implementation": implementation, "state": "measured", "allocator": "default", "step": times,
            "forward": times, "rounds": 5, "preempted": 0, "faults": 0.0, "fast_path": False, **more, **(
                {"limit": limit} if implementation == "normkit" else {})}  # fmt: skip


RECORDS = [
    record("LSTM layer", "torch", 10.0),
    record("LSTM layer", "normkit", 15.0, 1.6),
    record("LSTM batch", "torch", 10.0),
    record("LSTM batch", "normkit", 30.0, 2.5),
    record("TransformerEncoderLayer layer evaluation", "torch", 10.0, fast_path=True),
    record("TransformerEncoderLayer layer evaluation", "normkit", 12.5),
    record("TransformerEncoderLayer layer evaluation", "torch, no fast path", 20.0),
]


def test_the_page_says_who_keeps_the_limit_and_where_torch_is_faster():
    assert bench_blocks.answer(RECORDS) == [
        "1 of 2 layers keep their limit of torch's time: LSTM batch takes 3.0× of 2.5×",
        "TransformerEncoderLayer layer evaluation takes 1.25× the time of torch's fast path",
    ]
    rows = bench_blocks.table(RECORDS, "", "~").rows
    assert rows[1] == ["LSTM", "layer", "training", "normkit", "15.0", "1.50× [1.36, 1.67]", "1.6×", "yes"]
    assert rows[3][-1] == "no"
    assert rows[5][2:] == ["evaluation", "normkit", "12.5", "1.25× [1.14, 1.39]", "–", "–"]
    assert rows[6][5] == "2.0× [1.82, 2.2]"
    text = markdown.render(bench_page.document(RECORDS))
    assert "LSTM batch takes 3.0× of 2.5×" in text
    assert "recurrent and Transformer layers, default allocator" in text
