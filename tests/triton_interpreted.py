"""The Triton kernels in Triton's interpreter; ``tests/test_triton.py`` starts this file in a process of its own.

Tiles are as small as they can be, so that small tensors take every path: several tiles, several parts that are merged,
groups that share a block, groups that are wider than one, rows that do not fit into a tile.
"""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

import normkit as nk
from normkit import dispatch
from normkit.kernels import (
    contract,
    loading,
    triton_channels_launch,
    triton_launch,
    triton_prenorm,
    triton_resident_launch,
    triton_rows_launch,
    triton_wide_launch,
)
from normkit.kernels.contract import Work
from normkit.kernels.plan import plan_for
from normkit.kernels.triton import Launched, launchable
from normkit.kernels.triton_channels import tile_of
from normkit.kernels.triton_channels_launch import Channels
from normkit.kernels.triton_prenorm import add_norm
from normkit.kernels.triton_rows import rows_of
from normkit.kernels.triton_wide_launch import WideRows
from normkit.norms import batch_norm
from normkit.statistics import Ghost
from oracle import examine, observe
from test_native import numbers, spread


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    for name in ("MEASURING", "SUMMING", "WRITING"):
        paces = getattr(triton_channels_launch, name)
        small = {shape: pace._replace(tile=512) for shape, pace in paces.items()}
        monkeypatch.setattr(triton_channels_launch, name, small)
    monkeypatch.setattr(triton_rows_launch, "TILE", 512)
    monkeypatch.setattr(triton_rows_launch, "WIDEST", 32)
    monkeypatch.setattr(triton_wide_launch, "PACE", triton_wide_launch.PACE._replace(tile=512))
    for name in ("FORWARD", "BACKWARD"):  # those have tests of their own
        monkeypatch.setattr(triton_resident_launch, name, 0.0)
    processors(1, monkeypatch)


def processors(count: int, monkeypatch) -> None:
    """Of a GPU that is not there."""
    for module in (triton_launch, triton_rows_launch):
        monkeypatch.setattr(module, "processors", lambda device: count)


PATHS = {  # norm, shape, channels last
    "batch, planes, parts": (lambda: nk.BatchNorm2d(20), (3, 20, 7, 5), False),
    "batch, planes longer than a tile": (lambda: nk.BatchNorm1d(3), (2, 3, 150), False),
    "batch, columns": (lambda: nk.BatchNorm2d(24), (3, 24, 7, 5), True),
    "batch, columns whose bits are no bytes": (lambda: nk.BatchNorm2d(5), (4, 5, 9, 8), True),
    "batch, features": (lambda: nk.BatchNorm1d(37), (70, 37), False),
    "group, several in a block": (lambda: nk.GroupNorm(4, 12), (3, 12, 6, 5), False),
    "group, several in a block, columns": (lambda: nk.GroupNorm(8, 40), (2, 40, 6, 5), True),
    "group, wider than a block": (lambda: nk.GroupNorm(1, 70), (2, 70, 4, 5), False),
    "group, wider than a block, columns": (lambda: nk.GroupNorm(2, 140), (1, 140, 6, 5), True),
    "group without space": (lambda: nk.GroupNorm(3, 12), (7, 12), False),
    "instance": (lambda: nk.InstanceNorm2d(6, affine=True), (3, 6, 9, 7), False),
    "instance, columns": (lambda: nk.InstanceNorm2d(6, affine=True), (3, 6, 9, 7), True),
    "rows in one tile": (lambda: nk.LayerNorm(20), (9, 20), False),
    "rows in several tiles": (lambda: nk.LayerNorm(70), (3, 5, 70), False),
    "rms": (lambda: nk.RMSNorm(70), (6, 70), False),
    "over channels": (lambda: nk.LayerNorm(70, channels_first=True), (2, 70, 5, 4), False),
    "rms over channels": (lambda: nk.RMSNorm(20, channels_first=True), (2, 20, 19), False),
}
QUICK = ("batch, planes, parts", "batch, columns", "group, wider than a block, columns", "rows in several tiles")
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in PATHS]


def case(name: str, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, Tensor, Tensor]:
    """Layer, input and residual of a path."""
    make, shape, last = PATHS[name]
    layer, x, residual = make(), numbers(shape, dtype), (torch.randn(shape) * 2 - 1).to(dtype)
    layer.backend = "triton"
    if last:
        x, residual = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, residual))
    return spread(layer, dtype), x, residual


@pytest.mark.parametrize("name", EVERY)
def test_every_path_gives_what_the_norm_says(name):
    layer, x, residual = case(name)
    examine(layer, x)
    layer.activation = torch.nn.ReLU()
    examine(layer, x, residual)


WIDE = [
    pytest.param(shape, norm, marks=() if shape == (3, 300) else pytest.mark.slow)
    for shape in ((3, 300), (1, 1000), (20, 200))
    for norm in (nk.LayerNorm, nk.RMSNorm)
]


@pytest.mark.parametrize(("shape", "norm"), WIDE)
def test_few_rows_that_are_wider_than_a_tile_are_split(shape, norm, monkeypatch):
    processors(4, monkeypatch)
    monkeypatch.setattr("normkit.kernels.plan._plans", {})
    layer, x, residual = spread(norm(shape[-1]), torch.float32), numbers(shape, torch.float32), torch.randn(shape)
    layer.backend = "triton"
    call = nk.explanation.recorded(layer, x)
    kernel = plan_for(call, "triton").kernel
    assert isinstance(kernel, WideRows)
    assert kernel.parts > 1
    examine(layer, x)
    for activation in ("relu", "silu"):  # with bits, and with the residual kept
        layer.activation = nk.epilogue.activation_module(activation)
        examine(layer, x, residual)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", PATHS)
def test_narrow_types(name, dtype):
    """The interpreter cuts float32 off to bfloat16 and does not round: one unit in the last place."""
    layer, x, residual = case(name, dtype)
    for activation in (torch.nn.ReLU(), torch.nn.SiLU()):
        layer.activation = activation
        examine(layer, x, residual)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu", "gelu", torch.nn.GELU("tanh")], ids=str)
@pytest.mark.parametrize("name", ["batch, planes, parts", "batch, columns", "rows in one tile", "over channels"])
def test_activations_without_and_behind_a_residual(name, activation):
    layer, x, residual = case(name)
    layer.activation = nk.epilogue.activation_module(activation)
    examine(layer, x)
    examine(layer, x, residual)


@pytest.mark.slow
@pytest.mark.parametrize("name", PATHS)
def test_the_same_twice_to_the_last_bit(name):
    layer, x, residual = case(name)
    layer.activation = torch.nn.SiLU()
    upstream = torch.randn_like(x)
    first, second = (observe(copy.deepcopy(layer), x, residual, upstream) for _ in range(2))
    assert all(torch.equal(first[what], second[what]) for what in first)


@pytest.mark.slow
@pytest.mark.parametrize("name", PATHS)
def test_64_bit_indices_give_the_same_bits(name, monkeypatch):
    """They are for tensors of 2**31 elements and more, which no test has."""
    layer, x, residual = case(name)
    layer.activation = torch.nn.ReLU()
    upstream = torch.randn_like(x)
    narrow = observe(copy.deepcopy(layer), x, residual, upstream)
    monkeypatch.setattr(triton_launch, "is_wide", lambda work: True)
    monkeypatch.setattr("normkit.kernels.plan._plans", {})
    found = observe(copy.deepcopy(layer), x, residual, upstream)
    assert all(torch.equal(narrow[what], found[what]) for what in narrow)


def test_2_to_the_31_elements_get_64_bit_indices():
    for shape in ("planes", "columns", "rows", "tiles"):
        for n, wide in ((2**10, False), (2**11, True)):
            work = Work(shape, n, 2**10, 2**10 if shape != "rows" else 1, 0 if shape != "rows" else 1)
            if shape == "rows":
                work = Work("rows", n * 2**10, 2**10, 1, 1)
            assert triton_launch.is_wide(work) is wide
            kernel = triton_launch.kernel_for(work, torch.empty(0), None, 0.0, False, True, True)
            launches = [value for value in vars(kernel).values() if isinstance(value, triton_launch.Launch)]
            constants = [launch.constants["WIDE"] for launch in launches if "WIDE" in launch.constants]
            assert constants
            assert all(found is wide for found in constants)


@triton.jit
def _places(offsets, rows, number, c, s, BC: tl.constexpr, BP: tl.constexpr):
    """Where a tile of the last positions lies, and the rows of the last block."""
    channels, lane = tl.arange(0, BC), tl.arange(0, BP)
    section = tl.full([], 0, tl.int64)
    where, valid, _, _ = tile_of(number, section, channels, channels < c, 1, c, s, s, 1, number + 1, BP, True, False)
    tl.store(offsets + (channels * BP)[:, None] + lane[None, :], tl.where(valid, where, -1))
    _, r, inside = rows_of(number, number + 1, 0, 1, s, BC, True)
    tl.store(rows + channels, tl.where(inside, r, -1))


def test_the_place_of_an_element_is_counted_with_64_bits_from_the_start():
    """Three channels of 2**31 + 5 positions: the index of a position alone does not fit into 32 bits."""
    s, block = 2**31 + 5, 16
    offsets, rows = torch.empty(16, block, dtype=torch.int64), torch.empty(16, dtype=torch.int64)
    _places[(1,)](offsets, rows, s // block, 3, s, BC=16, BP=block)
    last = torch.tensor([s - 5, s - 4, s - 3, s - 2, s - 1] + [-1] * 11)
    assert torch.equal(rows, last)
    for channel in range(16):
        assert torch.equal(offsets[channel], last.where(last < 0, last + channel * s) if channel < 3 else last * 0 - 1)


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_running_statistics_after_some_steps_are_torchs(momentum):
    ours, theirs = nk.BatchNorm2d(5, momentum=momentum, backend="triton"), torch.nn.BatchNorm2d(5, momentum=momentum)
    for _ in range(3):
        x = numbers((4, 5, 6, 3), torch.float32) * 2
        ours(x), theirs(x)
    for got, wanted in zip(ours.buffers(), theirs.buffers(), strict=False):
        torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def _one_too_few(kernel: Channels) -> None:
    kernel.values -= 1
    kernel.prepare()


def _a_part_left_out(kernel: Channels) -> None:
    launch = kernel._normalise
    launch.grid = (launch.grid[0], launch.grid[1] - 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [_one_too_few, _a_part_left_out])
def test_a_kernel_that_is_wrong_is_found_out(spoil, monkeypatch):
    made = triton_launch.kernel_for

    def spoiled(*given):
        kernel = made(*given)
        spoil(kernel)
        return kernel

    monkeypatch.setattr(triton_launch, "kernel_for", spoiled)
    monkeypatch.setattr("normkit.kernels.plan._plans", {})
    layer, x, _ = case("batch, planes, parts")
    with pytest.raises(AssertionError, match="elements are wrong"):
        examine(layer, x)


TUNED = {
    "rows": (Work("rows", 4, 20, 1, 1), True),
    "rows of groups": (Work("rows", 4, 20, 1, 2), True),
    "evaluation": (Work("planes", 2, 16, 20, 0), False),
}


@pytest.mark.parametrize("name", TUNED)
def test_tuning_takes_the_fastest_number_of_warps_for_forward_and_backward(name, monkeypatch):
    work, batch = TUNED[name]
    x = torch.randn(work.n, work.c, work.s)
    kernel = triton_launch.kernel_for(work, x, "relu", 0.0, True, True, batch)
    ran, chosen, prepare, times = [], [], kernel.prepare, iter((3.0, 1.0, 2.0))
    kernel.prepare = lambda factor: (chosen.append(factor), prepare(factor))

    def time_of(step, **options):
        ran.append(step().shape)
        return next(times)

    monkeypatch.setattr("triton.testing.do_bench", time_of)
    triton_launch.tune(kernel, x)
    assert chosen == [*triton_launch.WARPS, triton_launch.WARPS[1]]
    assert ran == [x.shape] * 3


# What one backend saves, another reads.

EXCHANGED = ("batch, columns", "batch, planes, parts", "group, wider than a block", "rows in one tile", "over channels")


@pytest.mark.skipif(loading.module is None, reason=str(loading.absence))
@pytest.mark.parametrize("name", [EXCHANGED[0], *(pytest.param(n, marks=pytest.mark.slow) for n in EXCHANGED[1:])])
def test_forward_on_one_backend_and_backward_on_the_other(name):
    layer, x, residual = case(name)
    layer.activation = torch.nn.ReLU()
    call = nk.explanation.recorded(layer, x.requires_grad_(), residual=residual)
    upstream, saved = torch.randn_like(x), {}
    plans = {backend: plan_for(call, backend) for backend in ("native", "triton")}
    for backend, plan in plans.items():
        y = nk.dispatch.BACKENDS[backend].run(_with_plan(call, plan))
        saved[backend] = y.grad_fn.saved_tensors[-2:]
        own = torch.autograd.grad(y, [x, *layer.parameters()], upstream)
        saved[backend] = (*saved[backend], own)
    assert plans["native"].bits == plans["triton"].bits > 0
    for ours, theirs in (("native", "triton"), ("triton", "native")):
        y = nk.dispatch.BACKENDS[ours].run(_with_plan(call, plans[ours]))
        stats, bits = y.grad_fn.saved_tensors[-2:]
        stats.data.copy_(saved[theirs][0])
        bits.data.copy_(saved[theirs][1])
        found = torch.autograd.grad(y, [x, *layer.parameters()], upstream)
        for got, wanted in zip(found, saved[theirs][2], strict=True):
            torch.testing.assert_close(got, wanted)


def _with_plan(call, plan):
    call = copy.copy(call)
    call.plan = plan
    call.running_mean = call.running_var = None
    return call


def test_bits_take_as_many_bytes_as_in_the_compiled_kernels():
    if loading.module is None:
        pytest.skip(str(loading.absence))
    for shape, code in (("planes", 0), ("columns", 1), ("rows", 2), ("tiles", 3)):
        for n, c, s in ((3, 6, 35), (2, 64, 49), (4, 270, 9), (5, 3, 1100)):
            for groups in (0, c) if shape in ("planes", "columns") else (1 if shape == "rows" else 0,):
                work = Work(shape, n, c, 1 if shape == "rows" else s, groups)
                kernel = loading.module.Kernel(code, 0, 0, 1, 0.0, True, True, True, n, c, work.s, groups)
                assert contract.bits_needed(work) == kernel.bits


# Halves, for statistics that are merged in between.


@pytest.mark.parametrize("shape", [(6, 5, 4, 3), (4, 16, 3, 3)], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["channels_first", "channels_last"])
def test_ghost_batches_are_those_of_the_composite(shape, last):
    x = numbers(shape, torch.float32)
    x = x.to(memory_format=torch.channels_last) if last else x
    residual, upstream = torch.randn_like(x), torch.randn_like(x)
    ours = spread(nk.BatchNorm2d(shape[1], activation="relu", statistics=Ghost(2), backend="triton"), torch.float32)
    theirs = copy.deepcopy(ours)
    theirs.backend = "torch"
    got, wanted = (observe(layer, x, residual, upstream) for layer in (ours, theirs))
    for what in wanted:
        torch.testing.assert_close(got[what], wanted[what], msg=lambda m, what=what: f"{what}: {m}")


def test_a_mask_leaves_values_out():
    x, mask = numbers((4, 6, 5, 5), torch.float32), torch.rand(4, 1, 5, 5) > 0.5
    ours = spread(nk.BatchNorm2d(6, activation="silu", backend="triton"), torch.float32)
    theirs = copy.deepcopy(ours)
    theirs.backend = "torch"
    torch.testing.assert_close(ours(x, mask=mask), theirs(x, mask=mask))
    torch.testing.assert_close(ours.running_var, theirs.running_var)


@pytest.mark.slow
def test_gradients_of_gradients():
    for name in ("batch, planes, parts", "rows in one tile"):
        layer, x, residual = case(name)
        layer.activation = torch.nn.ReLU()
        other = copy.deepcopy(layer)
        other.backend = "torch"
        found = []
        for one in (layer, other):
            leaf, added = x.detach().requires_grad_(), residual.detach().requires_grad_()
            y = one(leaf, residual=added)
            torch.manual_seed(3)
            (dx, _) = torch.autograd.grad(y, (leaf, added), torch.randn_like(y), create_graph=True)
            found.append(
                [dx, *torch.autograd.grad(dx, (leaf, *one.parameters()), torch.randn_like(y), allow_unused=True)]
            )
        for got, wanted in zip(*found, strict=True):
            got, wanted = (torch.zeros(()) if t is None else t for t in (got, wanted))
            torch.testing.assert_close(got.expand_as(wanted), wanted, rtol=1e-3, atol=1e-4)


def test_a_batch_with_nan_moves_no_statistics():
    layer = nk.BatchNorm2d(3, backend="triton")
    layer(numbers((4, 3, 5, 5), torch.float32))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = numbers((4, 3, 5, 5), torch.float32)
    x[1, 2, 0, 0] = torch.nan
    y = layer(x)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert y[:, 2].isnan().all()
    assert not y[:, :2].isnan().any()


# Add, then normalise.


@pytest.mark.parametrize(
    ("features", "gpu"), [(20, 1), (70, 1), (70, 4)], ids=["one tile", "several tiles", "split rows"]
)
@pytest.mark.parametrize("center", [True, False], ids=["layer", "rms"])
def test_add_norm_is_the_two_steps_written_by_hand(center, features, gpu, monkeypatch):
    processors(gpu, monkeypatch)
    triton_prenorm._kernel.cache_clear()
    x, residual = numbers((9, features), torch.float32), torch.randn(9, features)
    weight, bias = 0.5 * torch.randn(features), torch.randn(features) if center else None
    of_y, of_h = torch.randn_like(x), torch.randn_like(x)

    def by_hand(x, residual, weight, bias):
        h = x + residual
        if center:
            return F.layer_norm(h, (features,), weight + 1, bias), h
        return F.rms_norm(h, (features,), weight + 1, 1e-5), h

    def ours(x, residual, weight, bias):
        return add_norm(x, residual, weight, bias, center=center, weight_offset=1.0)

    found = []
    for function in (ours, by_hand):
        leaves = [None if t is None else t.clone().requires_grad_() for t in (x, residual, weight, bias)]
        y, h = function(*leaves)
        wanted = [t for t in leaves if t is not None]
        found.append([y, h, *torch.autograd.grad((y, h), wanted, (of_y, of_h))])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_add_norm_under_a_compiler_is_one_operator_with_eagers_bits():
    x, residual = numbers((9, 20), torch.float32), torch.randn(9, 20)
    weight, bias = torch.randn(20), torch.randn(20)

    def step(x, residual, weight, bias):
        y, h = add_norm(x, residual, weight, bias, weight_offset=1.0)
        return y * 2, h + 1

    torch._dynamo.reset()
    found = []
    for function in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        leaves = [t.clone().requires_grad_() for t in (x, residual, weight, bias)]
        y, h = function(*leaves)
        found.append([y, h, *torch.autograd.grad((y, h), leaves, (x, residual))])
    assert all(torch.equal(got, wanted) for got, wanted in zip(*found, strict=True))
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    torch.library.opcheck(torch.ops.normkit.add_norm.default, (*leaves, 1e-5, True, 1.0))


def test_add_norm_asked_for_one_output_and_some_gradients_gives_these():
    x, residual, weight = (t.requires_grad_() for t in (torch.randn(5, 20), torch.randn(5, 20), torch.randn(20)))
    y, h = add_norm(x, residual, weight.detach())
    assert torch.equal(torch.autograd.grad(h, residual, torch.ones_like(h), retain_graph=True)[0], torch.ones(5, 20))
    (got,) = torch.autograd.grad(y, x, torch.ones_like(y) + residual.detach())
    (wanted,) = torch.autograd.grad(
        F.layer_norm(x + residual, (20,), weight), x, torch.ones_like(y) + residual.detach()
    )
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_add_norm_refuses_with_the_reason(monkeypatch):
    x = torch.randn(4, 8)
    for given, why in (
        ((x, torch.randn(4, 9)), r"the residual \(4, 9\)"),
        ((x.t(), x.t()), "x contiguous"),
        ((x.double(), x.double()), "no kernel for .* torch.float64"),
        ((x[:0], x[:0]), r"no kernel for \(0, 8\)"),
        ((x, x, torch.ones(4)), r"shape \(8,\)"),
    ):
        with pytest.raises(ValueError, match=why):
            add_norm(*given)
    monkeypatch.setattr("normkit.kernels.triton_prenorm.INTERPRETED", False)
    with pytest.raises(ValueError, match="tensors on cpu; the kernel is for one GPU"):
        add_norm(x, x)


# torch.compile


def both(layer: torch.nn.Module, x: Tensor, residual: Tensor, **options) -> tuple[dict, dict]:
    """What the compiled and the eager layer give."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    other = copy.deepcopy(layer)
    whole = torch.compile(layer, fullgraph=True, **options)
    upstream, found = torch.randn_like(x), []
    for call, own in ((whole, layer), (other, other)):
        leaf, added = x.detach().requires_grad_(), residual.detach().requires_grad_()
        y = call(leaf, residual=added)
        of = {"input": leaf, "residual": added, **dict(own.named_parameters())}
        gradients = dict(zip(of, torch.autograd.grad(y, list(of.values()), upstream), strict=True))
        found.append({"output": y, **gradients, **{f"buffer {n}": b.clone() for n, b in own.named_buffers()}})
    assert not torch._dynamo.utils.counters["graph_break"]
    return found[0], found[1]


COMPILED = [pytest.param(name, marks=() if name == "rows in one tile" else pytest.mark.slow) for name in PATHS]


@pytest.mark.parametrize("name", COMPILED)
def test_torch_compile_takes_the_layer_whole_and_gives_eagers_bits(name):
    layer, x, residual = case(name)
    layer.activation = torch.nn.ReLU()
    for training in (True, False) if "batch" in name else (True,):
        got, wanted = both(layer.train(training), x, residual, backend="aot_eager")
        assert all(torch.equal(got[what], wanted[what]) for what in wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["batch, planes, parts", "group, several in a block", "rows in one tile"])
def test_one_graph_serves_batches_of_any_size(name):
    layer, x, _ = case(name)
    torch._dynamo.reset()
    whole = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (len(x), 5, 2):
            a, b = numbers((n, *x.shape[1:]), torch.float32), torch.randn(n, *x.shape[1:])
            other = copy.deepcopy(layer)
            assert torch.equal(whole(a, residual=b), other(a, residual=b))


@pytest.mark.slow
def test_the_operators_are_what_torch_expects_of_operators():
    x, residual = numbers((3, 6, 5, 4), torch.float32), torch.randn(3, 6, 5, 4)
    weight, bias = torch.rand(6) + 0.5, torch.randn(6)
    running = torch.zeros(6), torch.ones(6)
    asked = ("[n] c [s...]", 1, 1, None, True, True, 0.1, 1e-5, "relu", 0.0)
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]
    torch.library.opcheck(torch.ops.normkit.normalize.default, (*leaves, *running, "triton", *asked))


# Words


def test_explain_says_why_they_do_not_run_unasked():
    layer, x = nk.BatchNorm2d(3), numbers((2, 3, 4, 4), torch.float32)
    assert "not triton: below 33,554,432 elements the call costs more" in str(nk.explain(layer, x))
    with nk.backend("triton"):
        assert nk.explain(layer, x).backend == "triton"


def test_they_leave_small_tensors_to_torch(monkeypatch):
    monkeypatch.setattr(nk.dispatch, "BACKENDS", {n: b for n, b in nk.dispatch.BACKENDS.items() if n != "native"})
    monkeypatch.setattr(nk.kernels.triton, "LEAST", {"batch": 200, "groups": 300, "rows": 100})
    for layer, shape, backend in (
        (nk.BatchNorm2d(3), (1, 3, 8, 8), "torch"),
        (nk.BatchNorm2d(3), (1, 3, 9, 9), "triton"),
        (nk.GroupNorm(3, 3), (1, 3, 9, 9), "torch"),
        (nk.GroupNorm(3, 3), (1, 3, 10, 10), "triton"),
        (nk.LayerNorm(9), (11, 9), "torch"),
        (nk.LayerNorm(9), (12, 9), "triton"),
    ):
        told = nk.explain(layer, numbers(shape, torch.float32))
        assert told.backend == backend, (layer, shape)
        assert ("below" in str(told)) is (backend == "torch")


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # inf - inf, of NumPy
def test_running_statistics_move_in_one_launch_unless_something_is_not_finite():
    for dtype in (torch.float32, torch.float64):
        for wrong in (None, torch.nan, torch.inf):
            old, new = [torch.randn(1500, dtype=dtype) for _ in range(2)], torch.rand(2, 1500, dtype=dtype)
            counters = torch.tensor(3), torch.tensor(1)
            if wrong is not None:
                new[1, 1400] = wrong
            wanted = [t.clone() for t in (old if wrong is not None else new)]
            assert nk.kernels.triton.settle(*old, *new, *counters)
            assert all(torch.equal(got, want) for got, want in zip(old, wanted, strict=True))
            assert [int(c) for c in counters] == ([3, 2] if wrong is not None else [4, 1])


straight = batch_norm.straight


def _ways(monkeypatch) -> list[bool]:
    """For each training call of a batch norm since, whether it went straight; on proposals of a GPU's kind."""
    seen: list[bool] = []

    def counted(*given):
        y = straight(*given)
        seen.append(y is not None)
        return y

    monkeypatch.setattr(dispatch, "proposal", lambda *kept: Launched(*kept) if launchable(*kept) else None)
    monkeypatch.setattr(batch_norm, "straight", counted)
    return seen


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # inf - inf, of NumPy
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_norm_in_training_goes_straight_to_the_kernels_with_the_same_bits(
    dtype, activation, residual, monkeypatch
):
    seen, found = _ways(monkeypatch), []
    for straightly in (True, False):
        if not straightly:
            monkeypatch.setattr(batch_norm, "straight", lambda *_: None)
        torch.manual_seed(0)
        layer = nk.BatchNorm2d(5, activation=activation, backend="triton")
        inputs = [torch.randn(4, 5, 3, 2, requires_grad=True) for _ in range(3)]
        inputs[1] = inputs[1].detach().index_fill(0, torch.tensor(1), torch.inf)  # moves nothing
        added = [torch.randn(4, 5, 3, 2, requires_grad=True) if residual else None for _ in inputs]
        narrow = [[None if t is None else t.to(dtype) for t in (x, y)] for x, y in zip(inputs, added, strict=True)]
        outputs = [layer(x, residual=y) for x, y in narrow]
        (outputs[0].sin() + outputs[2].sin()).sum().backward()  # the first call's copies were written over
        leaves = (*layer.parameters(), inputs[0], inputs[2], *([added[0], added[2]] if residual else ()))
        found.append([*outputs, *layer.buffers(), *(leaf.grad for leaf in leaves)])
    assert seen == [True] * 3
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))


@pytest.mark.parametrize(
    ("options", "x"),
    [
        ({"momentum": None}, torch.ones(4, 5, 3, 2)),
        ({"track_running_stats": False}, torch.ones(4, 5, 3, 2)),
        ({"activation": torch.nn.Tanh()}, torch.ones(4, 5, 3, 2)),
        ({}, torch.ones(4, 5, 3, 4)[..., ::2]),
        ({}, torch.ones(4, 5, 3, 2, dtype=torch.float64)),
        ({}, torch.zeros(4, 5, 3, 2, dtype=torch.complex64).conj().imag),  # its sign is not in its memory
    ],
)
def test_what_the_kernels_may_not_be_for_goes_the_long_way(options, x, monkeypatch):
    seen, layer = _ways(monkeypatch), nk.BatchNorm2d(5, backend="triton", **options)
    with contextlib.suppress(RuntimeError):  # it is refused there
        layer(x)
    assert seen == [False]


def test_a_call_that_no_kernel_takes_is_refused_with_the_reason():
    layer = nk.BatchNorm2d(3, backend="triton")
    for x, why in (
        (torch.empty(0, 3, 4, 4), "the input is empty"),
        (numbers((2, 3, 4, 8), torch.float32)[..., ::2], "neither contiguous nor channels-last"),
        (numbers((2, 3, 4, 4), torch.float64), "no Triton kernel for torch.float64"),
    ):
        with pytest.raises(RuntimeError, match=f"triton: {why}|triton: the input is {why}"):
            layer.to(x.dtype)(x)
