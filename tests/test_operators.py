"""What torch.compile sees of the CPU kernels: two operators, with eager's numbers, chosen where they are faster."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F

import normkit as nk
from normkit.kernels import limits, loading

pytestmark = pytest.mark.skipif(loading.module is None, reason=f"no compiled kernels: {loading.absence}")

LAYERS = {
    "batch": lambda **o: nk.BatchNorm2d(6, **o),
    "group": lambda **o: nk.GroupNorm(3, 6, **o),
    "instance": lambda **o: nk.InstanceNorm2d(6, affine=True, **o),
    "layer": lambda **o: nk.LayerNorm(7, **o),
    "layer over channels": lambda **o: nk.LayerNorm(6, channels_first=True, **o),
    "rms": lambda **o: nk.RMSNorm(7, **o),
}
SHAPE = (4, 6, 5, 7)


@pytest.fixture(autouse=True)
def _fresh_graphs():
    torch._dynamo.reset()


class Captured:
    """A backend of torch.compile that keeps the graphs it is given and runs them as they are."""

    def __init__(self):
        self.forward: list[str] = []

    def __call__(self, graph_module, inputs):
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def keep(graph, _):
            self.forward += [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
            return make_boxed_func(graph.forward)

        return aot_autograd(fw_compiler=keep, bw_compiler=keep)(graph_module, inputs)

    @property
    def operators(self):
        return [name for name in self.forward if name.startswith("normkit.normalize")]


def _step(call, layer, x, residual, upstream):
    """Output, gradients of everything, buffers afterwards."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, residual) if t is not None]
    y = call(leaves[0]) if residual is None else call(leaves[0], residual=leaves[1])
    grads = torch.autograd.grad(y, [*leaves, *layer.parameters()], upstream)
    return [y.detach(), *grads, *layer.buffers()]


def _input(shape=SHAPE, *, last=False, dtype=torch.float32):
    torch.manual_seed(0)
    x = (torch.randn(shape) * 3 + 5).to(dtype)
    return x.to(memory_format=torch.channels_last) if last else x


@pytest.mark.parametrize(
    ("activation", "residual"),
    [
        (None, False),
        ("relu", True),
        pytest.param("silu", False, marks=pytest.mark.slow),
        pytest.param("silu", True, marks=pytest.mark.slow),
    ],
    ids=["plain", "residual and relu", "silu", "residual and silu"],
)
@pytest.mark.parametrize("name", LAYERS)
def test_a_compiled_layer_has_the_numbers_of_the_eager_one_bit_for_bit(name, activation, residual):
    layer = LAYERS[name](backend="native", activation=activation)
    other, seen = copy.deepcopy(layer), Captured()
    x, upstream = _input(), torch.randn(SHAPE)
    added = torch.randn(SHAPE) if residual else None
    compiled = _step(torch.compile(layer, backend=seen, fullgraph=True), layer, x, added, upstream)
    for ours, eager in zip(compiled, _step(other, other, x, added, upstream), strict=True):
        assert torch.equal(ours, eager)
    assert len(seen.operators) == 2  # one forward, one backward


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_channels_last_and_other_types(dtype):
    layer = nk.BatchNorm2d(6, backend="native", activation="relu", dtype=dtype if dtype.itemsize == 8 else None)
    other = copy.deepcopy(layer)
    x, added = _input(last=True, dtype=dtype), _input(last=True, dtype=dtype) - 4
    upstream = torch.randn(SHAPE).to(dtype)
    compiled = _step(torch.compile(layer, backend="aot_eager", fullgraph=True), layer, x, added, upstream)
    for ours, eager in zip(compiled, _step(other, other, x, added, upstream), strict=True):
        assert torch.equal(ours, eager)


@pytest.mark.parametrize("name", ["batch", "group", "rms"])
def test_torchs_own_check_of_operators(name):
    layer = LAYERS[name](backend="native", activation="relu")
    x, residual = _input().requires_grad_(), torch.randn(SHAPE, requires_grad=True)
    running = (torch.zeros(6), torch.ones(6)) if name == "batch" else (None, None)
    asked = {
        "batch": ("[n] c [s...]", 1, 1, None, True),
        "group": ("n (g [c]) [s...]", 3, 1, None, True),
        "rms": ("n... [c...]", 1, 1, [7], False),
    }[name]
    inputs = (x, layer.weight, getattr(layer, "bias", None), residual, *running)
    torch.library.opcheck(
        torch.ops.normkit.normalize.default, (*inputs, "native", *asked, True, 0.1, 1e-5, "relu", 0.0)
    )


def test_one_graph_serves_batches_of_any_size():
    layer, seen = nk.GroupNorm(3, 6, backend="native", activation="silu"), Captured()
    compiled = torch.compile(layer, backend=seen, fullgraph=True, dynamic=True)
    for n in (2, 5, 9):
        x = _input((n, *SHAPE[1:]))
        assert torch.equal(compiled(x), layer(x))
    assert len(seen.operators) == 2  # forward and backward, once


def test_when_a_compiler_is_faster():
    faster = functools.partial(limits.compiler_is_faster, limits.BATCH)
    small, large = torch.empty(2**14), torch.empty(2**20)
    assert not faster(small, "relu", batch_statistics=True)
    assert faster(small[1:], "relu", batch_statistics=True)
    assert faster(small, None, batch_statistics=True)
    assert not faster(large, None, batch_statistics=True)
    assert faster(large, "gelu", batch_statistics=True)
    assert faster(large, "relu", batch_statistics=False)
    with torch.no_grad():
        assert faster(large, "relu", batch_statistics=True)
    middle = torch.empty(1, 64, 64, 64)
    last = middle.to(memory_format=torch.channels_last)
    for over, x, expected in (
        (limits.GROUP, last, False),
        (limits.INSTANCE, last, False),
        (limits.BATCH, last, True),
        (limits.GROUP, middle, True),
    ):
        assert limits.compiler_is_faster(over, x, None, batch_statistics=True) == expected


@pytest.mark.parametrize("backend", [None, "torch"], ids=str)
def test_a_compiler_gets_the_operators_where_they_are_faster_and_torchs_where_these_are_asked_for(backend, monkeypatch):
    monkeypatch.setattr(limits, "COMPILED_RELU", 100)
    seen = Captured()
    layer = nk.BatchNorm2d(6, activation="relu", backend=backend)
    torch.compile(layer, backend=seen, fullgraph=True)(_input())
    assert bool(seen.operators) == (backend is None)


def test_a_batch_that_is_not_finite_stays_out_of_the_running_statistics_in_compiled_code_too():
    layer = nk.BatchNorm2d(6, backend="native")
    x = _input()
    x[0, 0, 0, 0] = float("nan")
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(layer.running_mean, torch.zeros(6))
    assert int(layer.num_batches_tracked) == 0
    assert int(layer.num_batches_skipped) == 1


def test_what_the_kernels_cannot_do_is_said_when_they_are_asked_for_by_name():
    layer = nk.BatchNorm2d(6, backend="native")
    with pytest.raises(Exception, match="neither contiguous nor channels-last"):
        torch.compile(layer, backend="eager", fullgraph=True)(_input()[:, :, :, ::2])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_inductor_calls_them():
    layer = nk.BatchNorm2d(6, backend="native", activation="relu")
    other = copy.deepcopy(layer)
    model = lambda x: F.avg_pool2d(layer(x * 2), 2) + 1
    plain = lambda x: F.avg_pool2d(other(x * 2), 2) + 1
    x, upstream = _input(), torch.randn(4, 6, 2, 3)
    for ours, eager in zip(
        _step(torch.compile(model, fullgraph=True), layer, x, None, upstream),
        _step(plain, other, x, None, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, eager)
