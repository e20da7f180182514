"""The Triton kernels: in Triton's interpreter, in processes of their own, and compiled for GPUs that are not there."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import normkit as nk
from normkit.kernels import contract, loading, triton
from normkit.vocabulary.record import read_lines

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


FILES = ("triton_interpreted.py", "triton_resident_interpreted.py")


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("file", FILES)
def test_in_the_interpreter_a_few_of_them(file):
    interpreted(str(HERE / file), "-m", "not slow")


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("file", FILES)
def test_in_the_interpreter_every_path(file):
    interpreted(str(HERE / file), "-m", "slow")


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm"])
def test_in_the_interpreter_the_parity_tests_of_every_backend(norm):
    interpreted(str(HERE / "test_parity.py"), "-k", f"triton and {norm}")


@needs_triton
@pytest.mark.slow
def test_in_the_interpreter_batch_norm_that_goes_straight_to_torch():
    interpreted(str(HERE / "test_straight.py"), "-k", "launched")


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


def test_a_gpu_has_checked_them():
    """``PROVEN`` is the commit of a record that is green throughout."""
    _skip_unproven()
    states = recorded_states(triton.PROVEN)
    assert {state for _, state in states} == {"green"}
    assert len(states) > 50
    assert ("compiled", "green") in states


def recorded_states(commit: str) -> set[tuple[str, str]]:
    records = read_lines(HERE.parent / "records" / "bench" / "gpu" / commit / "parity.jsonl")
    return {(record["row"], record["state"]) for record in records if record["kind"] == "parity"}


KERNELS = sorted((HERE.parent / "src" / "normkit" / "kernels").glob("triton_*.py"))
ON_GPU = [path for path in KERNELS if "@triton.jit" in path.read_text(encoding="utf-8")]


def _skip_unproven() -> None:
    if triton.PROVEN is None:
        pytest.skip("no GPU has checked the kernels, and nobody gets them unasked")


def code_of(source: str) -> str:
    """Without comments and docstrings, which no GPU sees."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [line for line in node.body if not _is_text(line)]
    return ast.dump(tree)


def _is_text(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)


@pytest.mark.parametrize("file", ON_GPU, ids=lambda path: path.stem)
def test_they_are_those_that_a_gpu_has_checked(file):
    """Who changes a kernel measures it again (bench/gpu/README.md), or sets ``PROVEN`` to None until somebody has."""
    _skip_unproven()
    git = lambda *words: subprocess.run(["git", *words], cwd=HERE.parent, capture_output=True, text=True)
    if git("cat-file", "-e", f"{triton.PROVEN}^{{commit}}").returncode != 0:
        pytest.skip(f"this copy has no history that reaches back to {triton.PROVEN}")
    shown = git("show", f"{triton.PROVEN}:{file.relative_to(HERE.parent).as_posix()}")
    assert shown.returncode == 0, f"{file.name} is younger than {triton.PROVEN}"
    assert code_of(shown.stdout) == code_of(file.read_text(encoding="utf-8"))


def test_there_are_kernels_to_hold_to_that():
    assert len(ON_GPU) >= 5


def test_compilers_get_them_when_they_are_asked_for(monkeypatch):
    _skip_unproven()
    x = torch.empty(2**26, 8, device="meta")
    call = nk.dispatch.Call(nk.BatchNorm1d.spec, x, None, None, by_torch=lambda: x)
    assert not triton.reluctance(call)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    (reason,) = triton.reluctance(call)
    assert 'backend="triton" is worth a try' in reason
    assert nk.dispatch._torch_at_once(call.spec, x, None, False)


@needs_triton
def test_a_compiler_reads_the_question_whether_they_can_run():
    """As every layer under ``torch.compile`` asks on a GPU; here the GPU is one in name, and the graph is not run."""
    seen = []

    def forward(x):
        call = nk.dispatch.Call(nk.LayerNorm.spec, x, None, None, by_torch=lambda: x)
        return x if triton.reasons_against(call) else -x

    with FakeTensorMode():
        x = torch.empty(2**20, 8, device="cuda")
        torch.compile(forward, fullgraph=True, backend=lambda graph, _: seen.append(graph) or graph)(x)
    assert seen


def test_nobody_gets_them_unasked_before_a_gpu_has_checked_them(monkeypatch):
    monkeypatch.setattr(triton, "PROVEN", None)
    call = nk.explanation.recorded(nk.LayerNorm(8), torch.randn(2, 8))
    assert "not yet checked on a GPU" in nk.dispatch.TRITON.reluctance(call)[0]


@pytest.mark.skipif(loading.module is None, reason=str(loading.absence))
@pytest.mark.parametrize(("norm", "kind"), [(nk.LayerNorm, "rows"), (nk.BatchNorm1d, "batch")])
def test_a_gpu_has_limits_of_its_own(norm, kind):
    """Elsewhere than on the CPU, what the compiled kernels leave to torch says nothing."""
    least = triton.LEAST[kind]
    for rows, at_once in ((least // 64 - 1, True), (least // 64, False)):
        x = torch.empty(rows, 64, device="meta")
        assert nk.dispatch._torch_at_once(norm(64).spec, x, None, False) is at_once


class OnGPU:
    """As much of a tensor on a GPU as the limits ask for."""

    is_cuda = True

    def __init__(self, elements: int) -> None:
        self.elements = elements

    def numel(self) -> int:
        return self.elements


@pytest.mark.parametrize("captured", [False, True])
def test_a_captured_graph_takes_the_kernels_that_the_calls_before_it_took(captured, monkeypatch):
    """Others would have to be compiled and loaded during the capture, which CUDA refuses."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)
    for over, kind in (
        ("[n] c [s...]", "batch"),
        ("n c [s...]", "groups"),
        ("n (g [c]) [s...]", "groups"),
        ("n... [c...]", "rows"),
    ):
        assert triton.torch_is_faster(OnGPU(triton.LEAST[kind] - 1), over)
        assert not triton.torch_is_faster(OnGPU(triton.LEAST[kind]), over)


@pytest.mark.parametrize(
    ("norm", "features", "told"),
    [
        (nk.LayerNorm, 12288, True),
        (nk.LayerNorm, 8192, False),
        (nk.LayerNorm, 16385, False),
        (nk.RMSNorm, 12288, False),
    ],
)
def test_a_layer_norm_that_does_not_fit_into_the_registers_is_left_to_torch(norm, features, told):
    x = torch.empty(2**25 // features + 1, features, device="meta")
    call = nk.dispatch.Call(norm.spec, x, None, None, by_torch=lambda: x, trailing=1)
    call.plan = SimpleNamespace(work=contract.reduce(call.problem()))
    assert any("the layer norm of torch is faster" in reason for reason in triton.reluctance(call)) is told


@pytest.mark.parametrize(
    ("capability", "hip", "asked"), [((9, 0), None, True), ((7, 5), None, False), ((9, 4), "6", False)]
)
def test_gpus_unlike_the_one_they_ran_on_get_them_when_asked(capability, hip, asked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    triton._like_the_ones_they_ran_on.cache_clear()
    try:
        assert triton._like_the_ones_they_ran_on(torch.device("cuda", 0)) is asked
    finally:
        triton._like_the_ones_they_ran_on.cache_clear()


@pytest.fixture
def hindrance(monkeypatch):
    """Asked anew, on a machine without a C compiler."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(triton.shutil, "which", lambda name: None)
    triton.hindrance_to_start.cache_clear()
    yield triton.hindrance_to_start
    triton.hindrance_to_start.cache_clear()


@needs_triton
def test_without_a_c_compiler_torch_runs_instead_and_the_reason_is_told(hindrance):
    with FakeTensorMode():
        x = torch.empty(2**25, 8, device="cuda")
        call = nk.dispatch.Call(nk.LayerNorm.spec, x, None, None, by_torch=lambda: x)
        assert triton.reasons_against(call) == [hindrance()]
    assert "Triton finds no C compiler" in hindrance()


@needs_triton
@pytest.mark.parametrize("way", ["CC", "gcc", "build", "headers"])
def test_what_lets_triton_start(hindrance, way, monkeypatch, tmp_path):
    match way:
        case "CC":
            monkeypatch.setenv("CC", "/opt/cc")
        case "build":
            monkeypatch.setattr(importlib.import_module("triton").knobs.build, "impl", lambda *_: "")
        case _:
            monkeypatch.setattr(triton.shutil, "which", lambda name: f"/usr/bin/{name}" if name == "gcc" else None)
    (tmp_path / "Python.h").touch()
    headers = tmp_path / "none" if way == "headers" else tmp_path
    monkeypatch.setattr(triton.sysconfig, "get_paths", lambda: {"include": str(headers)})
    assert (hindrance() is None) is (way != "headers")
    if way == "headers":
        assert "Python.h" in hindrance()


def test_a_layer_on_the_cpu_loads_no_triton():
    program = (
        "import sys, torch, normkit as nk\n"
        "nk.explain(nk.BatchNorm2d(3), torch.randn(2, 3, 4, 4)); nk.BatchNorm2d(3)(torch.randn(2, 3, 4, 4))\n"
        "assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
