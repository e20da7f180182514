"""Activation checkpointing runs a forward pass twice; the layers are as if it ran once, bit for bit."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import normkit as nk
from normkit.statistics.recomputing import _first_pass
from twins import assert_same, off_scale

WIDTH = 6


@pytest.fixture(params=["auto", "torch"])
def each_backend(request):
    with nk.backend(request.param):
        yield


eager, slow = pytest.mark.usefixtures("each_backend"), pytest.mark.slow


class Block(nn.Module):
    """Layers with an activation and a residual inside them, one of which is called twice."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(2))
        self.bn1 = nk.BatchNorm2d(WIDTH, activation="relu", **options)
        self.bn2 = nk.BatchNorm2d(WIDTH, activation="silu", **options)
        self.instance = nk.InstanceNorm2d(WIDTH, affine=True, track_running_stats=True)
        self.tail = nk.BatchNorm2d(WIDTH, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.second(self.bn1(self.first(x))), residual=x)
        return self.tail(self.tail(self.instance(y)) + x)


def nested(module: nn.Module, x: Tensor) -> Tensor:
    inner = lambda y: checkpoint(module, y, use_reentrant=False)
    return checkpoint(lambda y: inner(y) * 2, x, use_reentrant=False) / 2


def selective(module: nn.Module, x: Tensor) -> Tensor:
    """Convolutions keep their results; the norms behind them run again."""
    keep = {torch.ops.aten.convolution.default: CheckpointPolicy.MUST_SAVE}
    policy = lambda context, op, *_, **__: keep.get(op, CheckpointPolicy.PREFER_RECOMPUTE)
    contexts = lambda: create_selective_checkpoint_contexts(policy)
    return checkpoint(module, x, use_reentrant=False, context_fn=contexts)


WAYS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "reentrant": lambda module, x: checkpoint(module, x, use_reentrant=True),
    "non-reentrant": lambda module, x: checkpoint(module, x, use_reentrant=False),
    "nested": nested,
    "nested-reentrant": lambda module, x: checkpoint(nested, module, x, use_reentrant=True),
    "selective": selective,
}
each_way = pytest.mark.parametrize("way", WAYS)


def outcome(model: nn.Module, run: Callable[[Tensor], Tensor], around=contextlib.nullcontext) -> dict[str, Tensor]:
    """Outputs, gradients and all buffers after three steps of training."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    found: dict[str, Tensor] = {}
    for step in range(3):
        x = off_scale((8, WIDTH, 12, 12), 1).requires_grad_()
        upstream = torch.randn(x.shape)
        optimizer.zero_grad()
        with around():
            y = run(x)
        y.backward(upstream)
        optimizer.step()
        found |= {f"{step} output": y.detach(), f"{step} gradient of input": x.grad}
        found |= {f"{step} gradient of {name}": p.grad.clone() for name, p in model.named_parameters()}
        found |= {f"{step} {name}": buffer.clone() for name, buffer in model.named_buffers()}
    return found


class Watching(TorchDispatchMode):
    """Sees every operator and changes none, so that compiled kernels step aside: as selective checkpointing does."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return operator(*args, **(kwargs or {}))


def watched(module: nn.Module, x: Tensor) -> Tensor:
    with Watching():
        return module(x)


def compare(model: nn.Module, way: Callable[[nn.Module, Tensor], Tensor], around=None) -> dict[str, Tensor]:
    """The model run plainly and in this way; ``around`` makes the context of a forward pass for a model."""
    other = copy.deepcopy(model)
    within = lambda m: contextlib.nullcontext if around is None else lambda: around(m)
    plain = model if way is not selective else lambda x: watched(model, x)
    wanted = outcome(model, plain, within(model))
    got = outcome(other, lambda x: way(other, x), within(other))
    assert_same(got, wanted)
    return got


POLICIES = {
    "Batch": nk.statistics.Batch(),
    "Ghost": nk.statistics.Ghost(4),
    "Running": nk.statistics.Running(),
    "Renorm": nk.statistics.Renorm(warmup=1),
}


@eager
@pytest.mark.parametrize("policy", POLICIES)
@each_way
def test_a_checkpointed_block_is_the_block(way, policy):
    got = compare(Block(statistics=POLICIES[policy]), WAYS[way])
    assert got["2 bn1.num_batches_tracked"] == 3
    assert got["2 tail.num_batches_tracked"] == 6
    assert got["2 tail.num_values_tracked"] == 6 * 8 * 12 * 12
    assert got["2 bn1.running_mean"].abs().min() > 0


@eager
def test_torchs_layer_counts_twice_in_the_same_harness():
    """What the tests above would see if a recomputing forward moved anything."""
    model = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH))
    with pytest.raises(AssertionError, match="running_mean"):
        compare(model, WAYS["non-reentrant"])


@eager
@each_way
def test_a_batch_that_is_not_finite_is_skipped_once(way):
    layer = nk.BatchNorm2d(WIDTH)
    x = off_scale((8, WIDTH, 12, 12), 1)
    x[0, 0, 0, 0] = torch.nan
    WAYS[way](layer, x.requires_grad_()).sum().backward()
    assert (layer.num_batches_skipped, layer.num_batches_tracked) == (1, 0)


@eager
@pytest.mark.parametrize("context", [nk.accumulate_statistics, nk.statistics_frozen])
@each_way
def test_the_context_of_the_forward_pass_counts_and_not_that_of_the_backward_pass(way, context):
    got = compare(Block(), WAYS[way], context)
    assert got["2 bn1.num_batches_tracked"] == (3 if context is nk.accumulate_statistics else 0)


@eager
@each_way
def test_micro_batches_that_are_checkpointed_are_pooled_once(way):
    layer, large = nk.BatchNorm2d(WIDTH, momentum=1.0), nn.BatchNorm2d(WIDTH, momentum=1.0)
    x = off_scale((8, WIDTH, 12, 12), 1)
    with nk.accumulate_statistics(layer):
        for part in x.split(2):
            WAYS[way](layer, part.clone().requires_grad_()).sum().backward()
    large(x)
    assert (layer.running_mean - large.running_mean).abs().max() < 1e-6 * large.running_mean.abs().max()
    assert (layer.running_var / large.running_var - 1).abs().max() < 1e-5
    assert layer.num_batches_tracked == 1


@eager
@each_way
def test_a_frozen_block_stays(way):
    model = Block()
    nk.freeze_(model, affine=False)
    got = compare(model, WAYS[way])
    assert got["2 bn1.num_batches_tracked"] == 0


@eager
@each_way
def test_masks_are_checkpointed_too(way):
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nk.BatchNorm2d(WIDTH, activation="relu")
            self.mask = torch.rand(8, 12, 12, generator=torch.Generator().manual_seed(2)) < 0.7

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x, mask=self.mask)

    assert compare(Masked(), WAYS[way])["2 bn.num_batches_tracked"] == 3


@eager
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_chain_in_segments_is_the_chain(use_reentrant):
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), nk.BatchNorm2d(WIDTH)) for _ in range(4)))
    compare(model, lambda m, x: checkpoint_sequential(m, 2, x, use_reentrant=use_reentrant))


# compiled


class Small(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(WIDTH, WIDTH, 1), nk.BatchNorm2d(WIDTH, activation="relu", **options)
        self.tail = nk.BatchNorm2d(WIDTH, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.bn(self.conv(x), residual=x))


def compiled(function: Callable) -> Callable:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)


@torch.no_grad()
def restore(model: nn.Module, before: nn.Module) -> None:
    for now, then in zip(model.parameters(), before.parameters(), strict=True):
        now.copy_(then)
    for now, then in zip(model.buffers(), before.buffers(), strict=True):
        now.copy_(then)


def compare_compiled(model: nn.Module, *ways: str, around=None) -> dict[str, Tensor]:
    """The compiled model run plainly, and inside eager checkpoints."""
    before, run = copy.deepcopy(model), compiled(model)
    within = contextlib.nullcontext if around is None else lambda: around(model)
    wanted = outcome(model, run, within)
    for way in ways:
        restore(model, before)
        assert_same(outcome(model, lambda x: WAYS[way](run, x), within), wanted)  # noqa: B023
    return wanted


@pytest.mark.parametrize("policy", ["Batch", "Renorm", *(pytest.param(p, marks=slow) for p in ("Ghost", "Running"))])
def test_a_compiled_block_in_an_eager_checkpoint_is_the_compiled_block(policy):
    """It is compiled once; only when it runs does it turn out whether it runs inside a backward pass."""
    model = Small(statistics=POLICIES[policy])
    wanted = compare_compiled(model, "reentrant", "non-reentrant", "nested")
    assert (wanted["2 bn.num_batches_tracked"], wanted["2 tail.num_batches_tracked"]) == (3, 3)


@pytest.mark.parametrize("context", [nk.accumulate_statistics, nk.statistics_frozen])
def test_a_compiled_block_in_a_checkpoint_listens_to_contexts(context):
    wanted = compare_compiled(Small(), "reentrant", "non-reentrant", around=context)
    assert wanted["2 bn.num_batches_tracked"] == (3 if context is nk.accumulate_statistics else 0)


@pytest.mark.parametrize("policy", ["Batch", "Renorm"])
def test_a_checkpoint_inside_a_compiled_function_is_the_compiled_function(policy):
    model = Small(statistics=POLICIES[policy])
    other = copy.deepcopy(model)
    wanted = outcome(model, compiled(model))
    assert_same(outcome(other, compiled(lambda x: WAYS["non-reentrant"](other, x))), wanted)
    assert wanted["2 bn.num_batches_tracked"] == 3


# across processes


@eager
@pytest.mark.parametrize("way", ["reentrant", "non-reentrant"])
def test_a_checkpointed_block_under_data_parallel_is_the_block(way):
    class Whole(nn.Module):
        def __init__(self, checkpointed: bool) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.head, self.block, self.checkpointed = nn.Conv2d(WIDTH, WIDTH, 1), Block(), checkpointed

        def forward(self, x: Tensor) -> Tensor:
            x = self.head(x)
            return WAYS[way](self.block, x) if self.checkpointed else self.block(x)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        results = []
        for checkpointed in (False, True):
            model = nn.parallel.DistributedDataParallel(Whole(checkpointed))
            results.append(outcome(model, model))
    finally:
        dist.destroy_process_group()
    assert_same(*results)
    assert results[0]["2 module.block.bn1.num_batches_tracked"] == 3


def test_the_question_for_compiled_code_is_answered_on_the_device():
    """A CUDA graph, which ``torch.compile(mode="reduce-overhead")`` captures, refuses a copy from the CPU's memory."""
    seen = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    near = torch.empty(2, device="meta")
    with Watching():
        _first_pass(near)
    assert seen == ["aten.full.default"]
