"""The page on several processes: its example runs, its arithmetic is right, its benchmark measures and tells."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from normkit.bench import plan, synchronized
from normkit.bench.cases import Case
from normkit.bench.cell import Effort
from normkit.bench.models import ResNet
from normkit.report import bench_page, bench_synchronized

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
LATENCY, BANDWIDTH = 10e-6, 10e9
"""What the page assumes."""
FORWARD, BACKWARD = 24, 16
"""Bytes per channel; test_synchronized.py counts them."""


def ring(processes: int, size: float, messages: int = 1) -> float:
    """Milliseconds."""
    return 2e3 * (processes - 1) * (messages * LATENCY + size / (processes * BANDWIDTH))


def tree(processes: int, size: float, messages: int = 1) -> float:
    return 2e3 * math.ceil(math.log2(processes)) * (messages * LATENCY + size / BANDWIDTH)


def test_the_cost_on_paper_is_what_the_formulas_give():
    with torch.device("meta"):
        channels = [module.num_features for module in ResNet().modules() if isinstance(module, nn.BatchNorm2d)]
    assert f"the {len(channels)} batch norms of a ResNet-50 ({sum(channels):,} channels)" in PAGE
    size = (FORWARD + BACKWARD) * sum(channels)
    assert f"{size / 1e6:.2f} MB per step in {2 * len(channels)}\ncalls" in PAGE
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [8, 64, 512, 4096, 10000]
    for row in rows:
        processes, *told = map(float, row)
        wanted = [f(int(processes), size, 2 * len(channels)) for f in (ring, tree)] + [tree(int(processes), 24 * 256)]
        assert told == pytest.approx(wanted, rel=0.005)
    assert f"{4 * 10_000 * (2 * 256 + 1) / 1e6:.1f} MB per layer with 10,000" in PAGE


@pytest.mark.slow
def test_the_example_trains_on_two_processes():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    script = str(ROOT / "examples" / "train_synchronized.py")
    ran = subprocess.run([*command, script], capture_output=True, text=True, env=environment, timeout=240)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[0] == "sync_: 2 x BatchNorm2d synchronised."
    assert float(lines[-2].rpartition(" ")[2]) > 0.9
    assert lines[-1] == "greatest difference of the running statistics between ranks: 0.0e+00"


# the benchmark


def test_the_benchmark_plans_every_shape_with_one_to_three_processes():
    tasks = plan.tasks("default", ["synchronized"])
    assert len(tasks) == 3 * len(synchronized.CASES)
    assert {task["processes"] for task in tasks} == {1, 2, 3}
    assert not any("processes" in task for task in plan.tasks("quick"))


@pytest.mark.slow
def test_two_processes_measure_and_count_their_bytes():
    records = synchronized.measure(Case("batch", (2, 5, 4, 3), "small"), "float32", 2, Effort(rounds=4))
    plain, ours = records
    assert (plain["implementation"], ours["implementation"]) == (synchronized.PLAIN, synchronized.SYNCHRONISED)
    assert plain["bytes"] == {"forward": 0, "backward": 0}
    assert ours["bytes"] == {"forward": FORWARD * 5, "backward": BACKWARD * 5}
    assert ours["parity"]["output"]["error"] <= ours["parity"]["output"]["limit"]
    assert ours["step"]["ms"] > 0
    assert ours["step"]["extra_us"]["rounds"] == ours["rounds"]
    assert "extra_us" not in plain["step"]


def told(processes: int, implementation: str, ms: float, **more: Any) -> dict[str, Any]:
    """One record of the benchmark."""
    part = {"ms": ms, "low_ms": ms, "high_ms": ms}
    if implementation == "normkit":
        part["extra_us"] = {"value": 1500.0, "low": 1000.0, "high": 2000.0}
    return {
        "kind": "synchronized",
        "op": "batch_norm",
        "state": "measured",
        "shape": [4, 64, 28, 28],
        "dtype": "float32",
        "layout": "contiguous",
        "implementation": implementation,
        "processes": processes,
        "bytes": {"forward": 1536, "backward": 1024},
        "allocator": "default",
        "quiet": True,
        "rounds": 9,
        "preempted": 0,
        "faults": 0.0,
        "forward": part,
        "step": part,
        **more,
    }


def test_the_benchmark_tells_bytes_and_the_difference_within_a_row():
    records = [told(p, who, ms) for p in (1, 2) for who, ms in (("plain", 1.25), ("normkit", 2.75))]
    records[-1]["quiet"] = False
    table = bench_synchronized.table(records, "~")
    assert table.rows == [
        ["4x64x28x28", "1", "1,536", "1,024", "1.25", "2.75", "+1.50 [+1.00, +2.00]"],
        ["4x64x28x28", "2", "1,536", "1,024", "~1.25", "~2.75", "~+1.50 [+1.00, +2.00]"],
    ]
    assert table.caption in [found.caption for found in bench_page.tables(records)]
    answer = "synchronising a batch norm over 2 or 3 processes costs 1.50 to 1.50 ms per step and layer here"
    assert answer in bench_page.answer(records)
    assert bench_synchronized.answer([]) == []
