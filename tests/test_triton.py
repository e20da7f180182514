"""The Triton kernels: in Triton's interpreter, in processes of their own, and compiled for GPUs that are not there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import normkit as nk
from normkit.kernels import loading, triton

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: make test installs it on Linux"
)
OVERFLOW = "ignore:overflow encountered:RuntimeWarning"
"""Of NumPy, which the interpreter computes with: exp(-z) far out in a sigmoid, lanes of a tile that nobody stores."""


def interpreted(*arguments: str) -> None:
    """Run tests in a process whose Triton interprets: that is settled when Triton is loaded."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE)}
    plugins = ["-p", "triton_interpreter", "-p", "no:xdist", "-W", OVERFLOW]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--timeout", "1200", *plugins, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.slow
@needs_triton
def test_in_the_interpreter_a_few_of_them():
    interpreted(str(HERE / "triton_interpreted.py"), "-m", "not slow")


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_in_the_interpreter_every_path():
    interpreted(str(HERE / "triton_interpreted.py"), "-m", "slow")


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm"])
def test_in_the_interpreter_the_parity_tests_of_every_backend(norm):
    interpreted(str(HERE / "test_parity.py"), "-k", f"triton and {norm}")


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("architecture", [80, 90])
def test_they_compile_for_gpus_that_are_not_there(architecture, tmp_path):
    done = subprocess.run(
        [sys.executable, str(HERE / "triton_ahead.py"), str(architecture), "--all"],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"sm_{architecture}: " in done.stdout


def test_a_layer_asked_to_run_on_them_says_why_it_cannot():
    layer = nk.LayerNorm(8, backend="triton")
    with pytest.raises(RuntimeError, match=r"Triton is not installed|these kernels are for CUDA"):
        layer(torch.randn(2, 8))
    reason = nk.explain(nk.LayerNorm(8), torch.randn(2, 8)).reasons["triton"]
    assert reason == triton.reasons_against(nk.explanation.recorded(layer, torch.randn(2, 8)))


def test_nobody_gets_them_unasked_before_a_gpu_has_checked_them():
    """The commit of a record that shows it, or nothing."""
    if triton.PROVEN is None:
        assert nk.dispatch.TRITON.reluctance(nk.explanation.recorded(nk.LayerNorm(8), torch.randn(2, 8)))
        return
    record = HERE.parent / "records" / "bench" / "gpu" / triton.PROVEN / "parity.jsonl"
    assert record.exists()
    assert '"state": "red"' not in record.read_text()


@pytest.mark.skipif(loading.module is None, reason=str(loading.absence))
@pytest.mark.parametrize("activation", [None, "relu"])
def test_once_proven_a_gpu_has_limits_of_its_own(activation, monkeypatch):
    """Elsewhere than on the CPU, what the compiled kernels leave to torch says nothing."""
    monkeypatch.setattr(triton, "PROVEN", "a commit")
    least = triton.SMALL if activation is None else triton.SMALL_FOLLOWED
    for rows, at_once in ((least // 64 - 1, True), (least // 64, False)):
        x = torch.empty(rows, 64, device="meta")
        followed = activation is not None
        assert nk.dispatch._torch_at_once(nk.LayerNorm(64).spec, x, activation, followed) is at_once


def test_a_layer_on_the_cpu_loads_no_triton():
    program = (
        "import sys, torch, normkit as nk\n"
        "nk.explain(nk.BatchNorm2d(3), torch.randn(2, 3, 4, 4)); nk.BatchNorm2d(3)(torch.randn(2, 3, 4, 4))\n"
        "assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
