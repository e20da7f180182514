"""The compiled CPU kernels, where the parity tests do not reach: shapes for every path, threads, streams, phases."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import normkit as nk
from normkit.kernels import limits, loading
from oracle import examine

pytestmark = pytest.mark.skipif(loading.module is None, reason=str(loading.absence))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SPACES = {  # (n, c, s...): each takes another path through the kernels
    "planes, several channels at once": (3, 10, 7, 7),
    "planes, longer than a stretch": (2, 2, 45, 47),
    "planes, one statistic for two threads": (4, 1, 9, 5),
    "columns, wide": (2, 270, 3, 1),
    "columns, narrow, rows left over": (3, 6, 17, 11),
    "columns, longer than a period": (1, 70, 61, 67),
}


def numbers(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Off-centre and off-scale, and another mean and deviation in every sample and channel."""
    x = torch.randn(shape, dtype=torch.float64) * 3 + 2
    for axis in (0, 1):
        ramp = torch.linspace(-1, 2, shape[axis], dtype=torch.float64).reshape([-1] + [1] * (len(shape) - axis - 1))
        x = x * (1 + ramp.abs()) + ramp
    return x.to(dtype)


def spread(layer: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Parameters away from 1 and 0."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return layer.to(dtype)


def makers(channels: int, **options):
    """The norms that take these channels, by name."""
    groups = 2 if channels % 2 == 0 else 1
    made = {
        "batch": lambda: nk.BatchNorm2d(channels, **options),
        "instance": lambda: nk.InstanceNorm2d(channels, affine=True, **options),
        "group": lambda: nk.GroupNorm(groups, channels, **options),
        "layer": lambda: nk.LayerNorm(channels, channels_first=True, **options),
        "rms": lambda: nk.RMSNorm(channels, channels_first=True, **options),
    }
    return {name: make for name, make in made.items() if channels > 1 or name not in ("layer", "rms")}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("last", [False, True], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize("shape", SPACES.values(), ids=SPACES)
def test_every_path_gives_what_the_norm_says(shape, last, threads):
    torch.set_num_threads(threads)
    for make in makers(shape[1], backend="native").values():
        for dtype in DTYPES[:2]:
            layer, x = spread(make(), dtype), numbers(shape, dtype)
            x = x.to(memory_format=torch.channels_last) if last else x
            examine(layer, x)
            layer.activation = torch.nn.ReLU()
            examine(layer, x, torch.randn_like(x) * 2 - 1)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    ("shape", "threads"),
    [  # large enough for a second thread to be of use, but for the first
        pytest.param((2, 96, 3, 5), 1, id="many short planes"),
        pytest.param((2, 320, 8, 9), 2, id="many short planes, two threads"),
        pytest.param((5, 1, 90, 93), 2, id="one statistic for two threads"),
        pytest.param((1, 3, 120, 121), 2, id="one group for two threads"),
        pytest.param((1, 6, 150, 151), 2, id="one sample for two threads"),
        pytest.param((1, 512, 33, 32), 2, id="gradients that are kept for a block of channels"),
        pytest.param((1, 3, 420, 421), 1, id="more gradients than are kept"),
    ],
)
@pytest.mark.parametrize("last", [False, True], ids=["channels_first", "channels_last"])
def test_a_curved_activation_behind_tensors_of_every_size(shape, threads, last, dtype):
    torch.set_num_threads(threads)
    made = makers(shape[1], backend="native", activation="silu")
    for name in ("batch", "instance", "group"):
        layer, x = spread(made[name](), dtype), numbers(shape, dtype)
        x = x.to(memory_format=torch.channels_last) if last else x
        examine(layer, x)
        examine(layer, x, torch.randn_like(x))


@pytest.mark.parametrize(
    ("activation", "by_hand", "least"),
    [  # torch's GELU in float64 loses its digits below -8
        ("silu", F.silu, -80.0),
        ("gelu", lambda x: x * torch.special.erfc(x * -(0.5**0.5)) / 2, -12.0),
    ],
    ids=["silu", "gelu"],
)
def test_curved_activations_are_right_to_a_few_roundings_wherever_they_are_not_zero(activation, by_hand, least):
    x = torch.cat([torch.linspace(least, 80, 16000), torch.linspace(-1, 1, 2000), torch.tensor([1e30, torch.inf])])
    layer = nk.BatchNorm1d(1, affine=False, eps=1e-30, activation=activation, backend="native").eval()  # so z is x
    leaf, oracle = x[:, None].requires_grad_(), x.double()[:, None].requires_grad_()
    y, wanted = layer(leaf), by_hand(oracle)
    torch.testing.assert_close(y.double(), wanted, rtol=8e-6, atol=0)  # most of it from rounding an exponent
    ordinary = slice(0, -2)  # torch's own derivatives at infinity are NaN
    (dx,) = torch.autograd.grad(y[ordinary].sum(), leaf)
    (dx_wanted,) = torch.autograd.grad(wanted[ordinary].sum(), oracle)
    torch.testing.assert_close(dx[ordinary].double(), dx_wanted[ordinary], rtol=8e-6, atol=2e-6)
    assert layer(torch.full((20_000, 1), torch.nan)).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [5, 96, 512, 700])
@pytest.mark.parametrize("norm", [nk.LayerNorm, nk.RMSNorm])
def test_what_comes_of_a_row_does_not_depend_on_its_neighbours(norm, width, dtype):
    torch.set_num_threads(1)
    layer = spread(norm(width, backend="native"), dtype)
    x, upstream = numbers((11, width), dtype).requires_grad_(), torch.randn(11, width).to(dtype)
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, upstream)
    for first, last in ((0, 1), (1, 4), (2, 6), (4, 11)):
        some = x.detach()[first:last].requires_grad_()
        mine = layer(some)
        assert torch.equal(mine, y[first:last])
        assert torch.equal(torch.autograd.grad(mine, some, upstream[first:last])[0], dx[first:last])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 1), (60, 100), (130, 37), (3, 4099), (700, 3)], ids=str)
def test_rows_and_features_of_any_width(shape, dtype):
    width = shape[1]
    layers = [nk.BatchNorm1d(width, backend="native"), nk.GroupNorm(1, width, backend="native")]
    layers += [nk.LayerNorm(width, backend="native"), nk.RMSNorm(width, backend="native")]
    for layer in layers:
        if width == 1 and not isinstance(layer, nk.BatchNorm1d):
            continue  # one value per statistic: no kernel takes it
        examine(spread(layer, dtype), numbers(shape, dtype))


@pytest.fixture
def streaming():
    """Every output, however small, is written past the caches."""
    before = loading.module.stream_above()
    loading.module.set_stream_above(0)
    yield
    loading.module.set_stream_above(before)


def results(layer: torch.nn.Module, x: Tensor, residual: Tensor | None, upstream: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, residual) if t is not None] + list(layer.parameters())
    y = layer(leaves[0], residual=None if residual is None else leaves[1])
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


@pytest.mark.parametrize("last", [False, True], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize("shape", SPACES.values(), ids=SPACES)
def test_a_streamed_output_is_the_same_to_the_last_bit(shape, last, request):
    for name, make in makers(shape[1], activation="relu").items():
        layer, x = make(), numbers(shape, torch.float32)
        x = x.to(memory_format=torch.channels_last) if last else x
        residual, upstream = torch.randn_like(x), torch.randn_like(x)
        with nk.backend("native"):
            stored = results(layer, x, residual, upstream)
            request.getfixturevalue("streaming")
            streamed = results(layer, x, residual, upstream)
        assert all(torch.equal(a, b) for a, b in zip(stored, streamed, strict=True)), name


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_number_of_threads_gives_the_same_bits(threads):
    torch.set_num_threads(threads)
    for shape in SPACES.values():
        for name, make in makers(shape[1], activation="silu", backend="native").items():
            layer, x = make(), numbers(shape, torch.float32)
            residual, upstream = torch.randn_like(x), torch.randn_like(x)
            first, second = (results(layer, x, residual, upstream) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), name


@pytest.mark.parametrize("last", [False, True], ids=["channels_first", "channels_last"])
def test_the_first_values_being_outliers_costs_no_digits(last):
    """The shift around which squares are summed starts at the mean of the first values: here the worst there is."""
    x = torch.randn(64, 2, 64, 64) * 1e-2
    x[0, :, :16] += 1e4
    x = x.to(memory_format=torch.channels_last) if last else x
    with nk.backend("native"):
        layer = nk.BatchNorm2d(2, momentum=1.0)
        layer(x)
    wanted = x.double().var((0, 2, 3))
    assert ((layer.running_var - wanted).abs() <= 1e-5 * wanted).all()


def test_a_batch_with_nan_moves_no_statistics():
    with nk.backend("native"):
        layer = nk.BatchNorm2d(3)
        layer(numbers((4, 3, 5, 5), torch.float32))
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        x = numbers((4, 3, 5, 5), torch.float32)
        x[1, 2, 0, 0] = torch.nan
        layer(x)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert layer.num_batches_skipped == 1


@pytest.mark.parametrize("create_graph", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("statistics", [None, nk.statistics.Ghost(2)], ids=["plain", "in two halves"])
def test_saved_tensors_may_come_back_in_another_layout(statistics, create_graph):
    """As hooks that pack what is saved do; the kernel reads addresses, so it has to notice."""
    layer = nk.BatchNorm2d(6, activation="relu", statistics=statistics, backend="native")
    x = torch.randn(4, 6, 5, 3).to(memory_format=torch.channels_last).requires_grad_()
    residual = torch.randn_like(x).requires_grad_()
    upstream = torch.randn_like(x)
    found = []
    for pack in (lambda t: t, lambda t: t.contiguous()):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = layer(x, residual=residual)
        found.append(torch.autograd.grad(y, (x, residual, *layer.parameters()), upstream, create_graph=create_graph))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("activation", ["relu", None, "silu"])
def test_the_output_may_be_overwritten_before_the_backward_pass(activation):
    x = numbers((4, 6, 5, 5), torch.float32)
    residual, upstream = torch.randn_like(x), torch.randn_like(x)
    layer = nk.BatchNorm2d(6, activation=activation, backend="native")
    wanted = results(layer, x, residual, upstream)
    leaves = [x.detach().requires_grad_(), residual.detach().requires_grad_(), *layer.parameters()]
    y = layer(leaves[0], residual=leaves[1])
    y.detach().fill_(torch.nan)
    got = torch.autograd.grad(y, leaves, upstream)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted[1:], strict=True))


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "silu", "gelu", torch.nn.GELU("tanh")], ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("last", [False, True], ids=["channels_first", "channels_last"])
def test_gradients_and_their_gradients(activation, with_residual, last):
    shape = (3, 4, 3, 2)
    for make in makers(4, activation=activation, backend="native").values():
        layer = spread(make(), torch.float64)
        x = numbers(shape, torch.float64)
        x = (x.to(memory_format=torch.channels_last) if last else x).requires_grad_()
        residual = torch.randn_like(x).requires_grad_() if with_residual else None
        inputs = tuple(t for t in (x, residual, *layer.parameters()) if t is not None)

        def f(x, *rest, layer=layer):
            parameters = dict(zip((name for name, _ in layer.named_parameters()), rest[with_residual:], strict=True))
            options = {"residual": rest[0]} if with_residual else {}
            return torch.func.functional_call(layer, parameters, (x,), options)

        assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, on the first use of jvp
@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_transforms_take_the_composite_and_are_right(transform):
    layer, x = nk.LayerNorm(6, activation="silu"), numbers((5, 6), torch.float32)
    by_hand = lambda x: F.silu(F.layer_norm(x, (6,), layer.weight, layer.bias))
    tangent = torch.randn_like(x)
    if transform == "vmap":
        got, wanted = torch.vmap(layer)(x), by_hand(x)
    elif transform == "grad":
        got, wanted = (torch.func.grad(lambda x, f=f: (f(x) * tangent).sum())(x) for f in (layer, by_hand))
    else:
        got, wanted = (torch.func.jvp(f, (x,), (tangent,))[1] for f in (layer, by_hand))
    torch.testing.assert_close(got, wanted)


def test_an_exported_program_holds_torchs_operators_only():
    layer = nk.BatchNorm2d(3, activation="relu").eval()
    program = torch.export.export(layer, (numbers((2, 3, 4, 4), torch.float32),))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets
    assert all(target.startswith("aten.") for target in targets)


@pytest.mark.parametrize("last", [False, True], ids=["channels_first", "channels_last"])
def test_the_phases_one_by_one_are_the_whole(last):
    """What synchronised and ghost statistics run on: the halves of a pass, with an exchange in between."""
    n, c, s = 4, 6, 35
    x = numbers((n, c, 7, 5), torch.float32)
    dy, residual = torch.randn_like(x), torch.randn_like(x)
    if last:
        x, dy, residual = (t.to(memory_format=torch.channels_last) for t in (x, dy, residual))
    weight, bias = torch.rand(c) + 0.5, torch.randn(c)
    kernel = loading.module.Kernel(int(last), 0, 0, 1, 0.0, True, True, True, n, c, s, 0)

    def run(*, together: bool) -> list[Tensor]:
        y, dx, dr = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
        stats, sums, var = torch.empty(2 * c), torch.empty(2 * c), torch.empty(c)
        bits, dweight, dbias = torch.empty(kernel.bits, dtype=torch.uint8), torch.empty(c), torch.empty(c)
        given = [t.data_ptr() for t in (x, residual, weight, bias, y, bits, stats)]
        if together:
            kernel.forward(*given, 0, 0, 0.0, 1e-5, 1)
        else:
            kernel.moments(x.data_ptr(), stats.data_ptr(), var.data_ptr(), 1e-5, 1)
            torch.testing.assert_close(var, x.var((0, 2, 3), correction=0))
            kernel.normalise(*given, 1)
        inputs = (x.data_ptr(), dy.data_ptr(), 0, weight.data_ptr(), bias.data_ptr(), stats.data_ptr(), bits.data_ptr())
        outputs = (dx.data_ptr(), dr.data_ptr(), dweight.data_ptr(), dbias.data_ptr())
        for steps in [3] if together else [1, 2]:
            kernel.backward(*inputs, *outputs, 0 if together else sums.data_ptr(), float(n * s), steps, 1)
        return [y, stats, dx, dr, dweight, dbias]

    for whole, parts in zip(run(together=True), run(together=False), strict=True):
        torch.testing.assert_close(parts, whole)


def test_a_call_that_no_kernel_takes_is_refused_with_the_reason():
    layer = nk.BatchNorm2d(3, backend="native")
    with pytest.raises(RuntimeError, match="native: the input is empty"):
        layer(torch.empty(0, 3, 4, 4))
    with pytest.raises(RuntimeError, match="neither contiguous nor channels-last"):
        layer(numbers((2, 3, 4, 8), torch.float32)[..., ::2])
    assert nk.explain(nk.BatchNorm2d(3), torch.empty(0, 3, 4, 4)).backend == "torch"


@pytest.mark.parametrize("norm", [nk.LayerNorm, nk.RMSNorm])
def test_an_input_of_another_size_is_an_error_without_a_weight_too(norm):
    layer = norm(96, elementwise_affine=False)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        layer(numbers((300, 97), torch.float32))


def test_tensors_that_an_address_does_not_tell_all_about_are_left_to_torch():
    """Gaps, another device, a lazy negation: a kernel would read past them in silence."""
    x, channels = numbers((2, 4, 3, 3), torch.float32), torch.arange(8.0)
    layer = nk.BatchNorm2d(4, activation="relu")
    call = lambda x, weight: nk.functional.batch_norm(x, None, None, weight, training=True, backend="native")
    for broken in (channels[::2], channels[:4].to("meta")):
        with pytest.raises(RuntimeError, match=r"native: (weight, bias or running|a tensor is on meta)"):
            call(x, broken)
    with pytest.raises(RuntimeError, match="changes its values"):
        call(torch._neg_view(x), None)
    torch.testing.assert_close(layer(torch._neg_view(x)), layer(-x))


def test_keeping_freed_memory_says_what_it_did():
    """In a process of its own: there is no way back."""
    program = "import normkit as nk; print(nk.tune_allocator())"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout == "glibc keeps freed memory from now on: no mmap below 2 GiB, no trimming\n"


def test_without_the_kernels_everything_runs_on_torch():
    program = """
import pytest, torch, normkit as nk
layer, x = nk.BatchNorm2d(3), torch.randn(2, 3, 4, 4) * 2 + 1
layer(x)
assert nk.explain(layer, x).backend == "torch"
with nk.backend("native"), pytest.raises(RuntimeError, match="NORMKIT_NATIVE=0"):
    layer(x)
"""
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "NORMKIT_NATIVE": "0"})


@pytest.mark.parametrize(
    ("shape", "dtype", "activation", "expected"),
    [
        ((2048, 96), torch.float32, None, True),
        ((32768, 96), torch.float32, None, False),
        ((4096, 256), torch.float32, None, True),
        ((8192, 256), torch.float32, None, False),
        ((2048, 96), torch.bfloat16, None, False),
        ((1024, 256), torch.bfloat16, None, False),
        ((1024, 96), torch.float32, "relu", False),
        ((8192, 256), torch.float32, "gelu", True),
    ],
)
def test_where_torchs_layer_norm_is_faster(shape, dtype, activation, expected):
    x, module = torch.empty(shape, dtype=dtype), nk.epilogue.activation_module(activation) if activation else None
    assert limits.torch_is_faster(limits.LAYER, True, x, module, activation is not None) == expected


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("over", limits.FEWEST)
def test_the_short_way_for_few_elements_says_what_the_rules_say(over, activation, dtype, layout, monkeypatch):
    module = nk.epilogue.activation_module(activation)
    fewest = limits.FEWEST.copy()
    monkeypatch.setattr(limits, "FEWEST", {})
    for width in (16, 256):
        x = torch.empty((fewest[over] // width - 1) // 16, 16, 1, width, dtype=dtype).contiguous(memory_format=layout)
        for by_batch in (True, False):
            with torch.set_grad_enabled(by_batch):
                assert limits.torch_is_faster(over, True, x, module, activation is not None, by_batch)


@pytest.mark.parametrize("avx512", [True, False])
@pytest.mark.parametrize("over", [limits.BATCH, limits.GROUP])
def test_where_torchs_gelu_is_faster(over, avx512, monkeypatch):
    monkeypatch.setattr(loading, "has_avx512", avx512)
    module = nk.epilogue.activation_module("gelu")

    def faster(dtype, form=torch.contiguous_format, by_batch=True):
        x = torch.empty(8, 64, 32, 32, dtype=dtype).contiguous(memory_format=form)
        return limits.torch_is_faster(over, True, x, module, True, by_batch)

    assert not faster(torch.float32)
    assert not faster(torch.bfloat16, torch.channels_last)
    assert faster(torch.bfloat16) is not avx512
    assert faster(torch.float64)
    if over == limits.BATCH:
        with torch.no_grad():
            assert faster(torch.bfloat16, by_batch=False)
            assert not faster(torch.bfloat16, torch.channels_last, by_batch=False)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set_that_this_machine_has(isa):
    environment = {**os.environ, "NORMKIT_ISA": isa}
    name = [sys.executable, "-c", "import torch; from normkit.kernels import loading; print(loading.module.isa())"]
    if subprocess.run(name, check=True, env=environment, capture_output=True, text=True).stdout.strip() != isa:
        pytest.skip(f"this machine has no {isa}")
    tests = [__file__, "-k", "every_path or any_width or gradients or phases or curved or neighbours", "-p", "no:xdist"]
    done = subprocess.run([sys.executable, "-m", "pytest", *tests], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("layout", ["expanded", "channels_last", "sliced"])
def test_a_residual_laid_out_in_another_way(layout):
    """The kernel reads a copy of it, which has to live as long as the kernel reads."""
    layer, x = nk.BatchNorm2d(7, activation="relu"), torch.randn(6, 7, 9, 5) * 3 + 2
    residual = {
        "expanded": torch.randn(6, 1, 9, 5).expand(-1, 7, -1, -1),
        "channels_last": torch.randn(6, 7, 9, 5).to(memory_format=torch.channels_last),
        "sliced": torch.randn(6, 7, 9, 10)[..., ::2],
    }[layout]
    wanted = layer(x, residual=residual.contiguous())
    for _ in range(8):  # memory that is free too early is soon used again
        scratch = [torch.full_like(x, torch.nan) for _ in range(4)]
        assert torch.equal(layer(x, residual=residual), wanted)
        del scratch
