"""Norms in one launch, in Triton's interpreter, every step a launch of its own; ``test_triton.py`` starts this file.

The cache is so small, and the programs are so many, that small tensors take every way: one team, several, more turns
than teams, groups in part of a block, a block, several blocks.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import normkit as nk
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
    small = {shape: pace._replace(tile=512, programs=2) for shape, pace in STAYING.items()}
    monkeypatch.setattr(triton_resident_launch, "STAYING", small)
    gpu(monkeypatch, processors=6, cache=2**20)


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
@pytest.mark.parametrize("name", PATHS)
def test_a_small_cache_takes_more_turns_and_gives_the_same(name, monkeypatch):
    gpu(monkeypatch, processors=6, cache=int(16384 / triton_resident_launch.SHARE))
    layer, x, _ = case(name)
    examine(layer, x)


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


def every_turn(teams: Teams) -> list[tuple[int, int]]:
    """(block, part) of all programs in all turns, as the kernel finds them."""
    turns, spans, width, _, number, members = teams.turn
    blocks = teams.place[-1]
    return [
        (turn // spans * blocks + turn % spans * width + member // teams.parts, member % teams.parts)
        for team in range(number)
        for member in range(members)
        for turn in range(team, turns, number)
    ]


@pytest.mark.parametrize("cache", [2**12, 2**16, 2**24, 2**28])
@pytest.mark.parametrize(
    "work",
    [
        Work("planes", 32, 64, 3136, 0),
        Work("columns", 128, 256, 3136, 0),
        Work("columns", 32, 2048, 49, 0),
        Work("planes", 8, 320, 4096, 32),
        Work("columns", 8, 320, 4096, 32),
        Work("planes", 8, 1280, 256, 32),
        Work("planes", 1, 256, 2**18, 32),
        Work("columns", 1, 256, 2**18, 32),
        Work("planes", 2, 32, 2**21, 32),
        Work("columns", 2, 960, 64, 32),
    ],
    ids=str,
)
def test_every_block_is_somebodys_once_and_all_programs_are_there_at_once(work, cache, monkeypatch):
    gpu(monkeypatch, processors=132, cache=cache)
    for tensors in (1, 2):
        teams = teams_for(work, torch.bfloat16, CPU, tensors, 1.0)
        if teams is None:
            continue
        assert teams.programs[0] <= 132 * triton_resident_launch.STAYING[work.shape].programs
        blocks = teams.sections * teams.place[-1]
        assert sorted(every_turn(teams)) == [(b, p) for b in range(blocks) for p in range(teams.parts)]
        assert teams.teams <= teams.most
        pooled, block = work.c // work.groups if work.groups else 1, teams.constants["BC"]
        spans = teams.turn[1]
        assert spans == 1 or (teams.width * block) % pooled == 0  # no group is in two turns
        assert 1 <= teams.parts <= teams.place[6]


def test_what_the_cache_cannot_hold_takes_two_passes(monkeypatch):
    work = Work("columns", 2, 64, 2**20, 64)
    for cache, fits in ((2**30, True), (2**20, False)):
        gpu(monkeypatch, processors=132, cache=cache)
        assert (teams_for(work, torch.bfloat16, CPU, 1, 1.0) is not None) is fits
