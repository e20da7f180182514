"""Norms in one launch, in Triton's interpreter, every step a launch of its own; ``test_triton.py`` starts this file.

So many programs that small tensors take every way: one team, several, groups in part of a block, in one, in several.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import normkit as nk
from normkit.kernels import triton as backend
from normkit.kernels import triton_launch, triton_resident_launch
from normkit.kernels.contract import Work
from normkit.kernels.plan import plan_for
from normkit.kernels.triton_resident_launch import STAYING, Teams, teams_for
from oracle import examine, observe
from test_native import numbers, spread

CPU = torch.device("cpu")
PATHS = {  # norm, shape, channels last
    "batch, planes": (lambda: nk.BatchNorm2d(20), (3, 20, 7, 5), False),
    "batch, planes longer than a tile": (lambda: nk.BatchNorm1d(3), (2, 3, 150), False),
    "batch, columns": (lambda: nk.BatchNorm2d(72), (3, 72, 7, 5), True),
    "batch, columns whose bits are no bytes": (lambda: nk.BatchNorm2d(5), (4, 5, 9, 8), True),
    "batch, features": (lambda: nk.BatchNorm1d(37), (70, 37), False),
    "group, several in a block": (lambda: nk.GroupNorm(4, 16), (3, 16, 6, 5), False),
    "group, not whole blocks": (lambda: nk.GroupNorm(4, 40), (2, 40, 6, 5), False),
    "group, several blocks": (lambda: nk.GroupNorm(3, 48), (2, 48, 4, 5), False),
    "group, several in a block, columns": (lambda: nk.GroupNorm(8, 64), (2, 64, 6, 5), True),
    "group, not whole blocks, columns": (lambda: nk.GroupNorm(8, 80), (2, 80, 6, 5), True),
    "instance": (lambda: nk.InstanceNorm2d(6, affine=True), (3, 6, 9, 7), False),
    "instance, columns": (lambda: nk.InstanceNorm2d(6, affine=True), (3, 6, 9, 7), True),
}
QUICK = ("batch, planes", "group, not whole blocks", "group, several in a block, columns")
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in PATHS]


@pytest.fixture(autouse=True)
def _small_gpu(monkeypatch):
    small = {shape: pace._replace(tile=512, programs=4) for shape, pace in STAYING.items()}
    monkeypatch.setattr(triton_resident_launch, "STAYING", small)
    gpu(monkeypatch, processors=3, cache=2**20)


def gpu(monkeypatch, processors: int, cache: int) -> None:
    """One that is not there."""
    monkeypatch.setattr(triton_launch, "processors", lambda device: processors)
    monkeypatch.setattr(triton_resident_launch, "cache", lambda device: cache)
    monkeypatch.setattr("normkit.kernels.plan._plans", {})


def case(name: str, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, Tensor, Tensor]:
    """Layer, input and residual of a path."""
    make, shape, last = PATHS[name]
    layer, x, residual = make(), numbers(shape, dtype), (torch.randn(shape) * 2 - 1).to(dtype)
    layer.backend = "triton"
    if last:
        x, residual = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, residual))
    spread(layer, dtype)
    kernel = plan_for(nk.explanation.recorded(layer, x), "triton").kernel
    assert kernel._forward is not None
    assert kernel._backward is not None
    return layer, x, residual


@pytest.mark.parametrize("name", EVERY)
def test_every_path_gives_what_the_norm_says(name):
    layer, x, residual = case(name)
    examine(layer, x)
    for activation in ("relu", "silu"):  # with bits, and with the residual kept
        layer.activation = nk.epilogue.activation_module(activation)
        examine(layer, x, residual)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", PATHS)
def test_narrow_types(name, dtype):
    layer, x, residual = case(name, dtype)
    layer.activation = torch.nn.ReLU()
    examine(layer, x, residual)


@pytest.mark.parametrize("name", EVERY)
def test_the_same_twice_to_the_last_bit(name):
    layer, x, residual = case(name)
    layer.activation = torch.nn.SiLU()
    upstream = torch.randn_like(x)
    first, second = (observe(copy.deepcopy(layer), x, residual, upstream) for _ in range(2))
    assert all(torch.equal(first[what], second[what]) for what in first)


@pytest.mark.slow
@pytest.mark.parametrize("name", PATHS)
def test_64_bit_indices_give_the_same_bits(name, monkeypatch):
    layer, x, residual = case(name)
    layer.activation = torch.nn.ReLU()
    upstream = torch.randn_like(x)
    narrow = observe(copy.deepcopy(layer), x, residual, upstream)
    monkeypatch.setattr(triton_launch, "is_wide", lambda work: True)
    monkeypatch.setattr("normkit.kernels.plan._plans", {})
    found = observe(copy.deepcopy(layer), x, residual, upstream)
    assert all(torch.equal(narrow[what], found[what]) for what in narrow)


def test_parameters_that_need_no_gradient_get_none():
    layer, x, _ = case("batch, planes")
    layer.requires_grad_(False)
    (dx,) = torch.autograd.grad(layer(x.requires_grad_()).square().sum(), x)
    exact = copy.deepcopy(layer).double()
    exact.backend = "reference"
    wanted = x.detach().double().requires_grad_()
    (right,) = torch.autograd.grad(exact(wanted).square().sum(), wanted)
    torch.testing.assert_close(dx.double(), right, rtol=1e-3, atol=1e-3)


def everybody(teams: Teams) -> list[tuple[int, int]]:
    """(block, part) of all programs, as the kernel finds them."""
    spans, width, _, number, members = teams.numbers
    blocks = teams.place[-1]
    return [
        (team // spans * blocks + team % spans * width + member // teams.parts, member % teams.parts)
        for team in range(number)
        for member in range(members)
    ]


@pytest.mark.parametrize(
    ("work", "fits"),
    [
        (Work("planes", 32, 64, 3136, 0), True),
        (Work("columns", 32, 64, 3136, 0), True),
        (Work("columns", 32, 2048, 49, 0), True),
        (Work("columns", 128, 256, 3136, 0), False),  # 205 MB
        (Work("planes", 8, 320, 4096, 32), True),
        (Work("columns", 8, 320, 4096, 32), True),
        (Work("planes", 1, 256, 2**14, 32), True),
        (Work("columns", 1, 256, 2**14, 32), True),
        (Work("columns", 2, 960, 64, 32), True),
        (Work("planes", 4096, 40, 16, 4), False),  # groups without end
    ],
    ids=str,
)
@pytest.mark.parametrize("tensors", [1, 2, 3])
def test_every_block_is_somebodys_once_and_all_programs_are_there_at_once(work, fits, tensors, monkeypatch):
    gpu(monkeypatch, processors=132, cache=2**27)
    teams = teams_for(work, triton_resident_launch.STAYING[work.shape], torch.bfloat16, CPU, tensors, 0.9)
    assert (teams is not None) is fits
    if teams is None:
        return
    assert teams.programs[0] <= 132 * triton_resident_launch.STAYING[work.shape].programs
    blocks = teams.sections * teams.place[-1]
    assert sorted(everybody(teams)) == [(b, p) for b in range(blocks) for p in range(teams.parts)]
    pooled, block = work.c // work.groups if work.groups else 1, teams.constants["BC"]
    assert teams.numbers[0] == 1 or (teams.width * block) % pooled == 0  # no group is with two teams
    assert 1 <= teams.parts <= teams.place[6]


def test_where_the_driver_refuses_the_passes_run_instead(monkeypatch):
    def refuse(launch, *tensors, more=()):
        if launch.kernel.fn.__module__ == "normkit.kernels.triton_resident":
            raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")
        start(launch, *tensors, more=more)

    start = triton_launch.Launch.__call__
    monkeypatch.setattr(triton_launch.Launch, "__call__", refuse)
    for name in ("batch, planes", "group, several in a block, columns"):
        layer, x, residual = case(name)
        layer.activation = torch.nn.ReLU()
        examine(layer, x, residual)


def test_counters_are_kept_by_stream_but_not_in_what_a_compiler_or_a_graph_owns(monkeypatch):
    layer, x, _ = case("batch, planes")
    made = plan_for(nk.explanation.recorded(layer, x), "triton").kernel._forward
    on_gpu = SimpleNamespace(is_cuda=True, device=CPU, get_device=lambda: 0)
    stream = SimpleNamespace(now=1, captured=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: stream.now, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: stream.captured)
    first = made._counters_for(on_gpu)
    assert made._counters_for(on_gpu) is first
    stream.now = 2
    second = made._counters_for(on_gpu)
    assert second is not first
    stream.captured = True
    assert made._counters_for(on_gpu) is not second
    stream.captured = False
    monkeypatch.setattr(backend.here, "compiled", True, raising=False)
    assert made._counters_for(on_gpu) is not second


def test_an_operator_of_a_compiled_program_says_where_it_is(monkeypatch):
    layer, x, _ = case("batch, planes")
    seen = []
    start = triton_resident_launch.Resident._counters_for

    def spied(resident, tensor):
        seen.append(backend.here.compiled)
        return start(resident, tensor)

    monkeypatch.setattr(triton_resident_launch.Resident, "_counters_for", spied)
    torch.compile(layer, backend="eager", fullgraph=True)(x.requires_grad_()).sum().backward()
    assert seen == [True, True]
    assert not getattr(backend.here, "compiled", False)
