"""Micro-batches: the running statistics move once per optimizer step, and as the large batch would have moved them."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

import normkit as nk
from processes import spawn
from twins import CHANNELS, TRACKING, assert_same, off_scale

each_tracking = pytest.mark.parametrize("twin", [t for t in TRACKING if all(t.options.values())], ids=str)
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
PARTS = (3, 1, 5, 2)
"""Samples per micro-batch."""


@pytest.fixture(autouse=True, params=["auto", "torch"])
def _on_each_backend_that_may_run(request):
    with nk.backend(request.param):
        yield


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """All that a forward pass may move, the counters that no checkpoint has included."""
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_close(layer: nn.Module, wanted: nn.Module, bound: float = 1e-6) -> None:
    """In deviations, for means that are not many of them: a rounding of those is larger. Counters exactly."""
    var = wanted.running_var.double()
    bound = bound * (wanted.running_mean.abs() / var.sqrt()).clamp(min=1)
    assert ((layer.running_mean.double() - wanted.running_mean).abs() / var.sqrt() <= bound).all()
    assert ((layer.running_var.double() / var - 1).abs() <= bound).all()
    if wanted.num_batches_tracked is not None:
        assert layer.num_batches_tracked == wanted.num_batches_tracked


def step(layer: nn.Module, micro_batches, **options) -> None:
    with nk.accumulate_statistics(layer):
        for x in micro_batches:
            layer(x, **options)


# one layer: what it saw, pooled


@pytest.mark.parametrize("momentum", [0.1, 1.0])
@each_tracking
def test_micro_batches_leave_what_the_large_batch_leaves(twin, momentum):
    layer, large = twin.layer(momentum=momentum), twin.torchs(*twin.required(), **twin.options, momentum=momentum)
    for _ in range(3):
        x = twin.input(samples=sum(PARTS))
        before = statistics(layer)
        with nk.accumulate_statistics(layer):
            for part in x.split(PARTS):
                layer(part)
                assert_same(statistics(layer), before)
        large(x)
        assert_close(layer, large)


@each_tracking
def test_moments_are_pooled_and_not_averaged(twin):
    """Sorted data: the spread between the micro-batches is most of the variance (of batch norm; an instance is one)."""
    x = twin.input(samples=8) + 100 * torch.arange(8).reshape(-1, *[1] * (twin.dim + 1))
    layer, large = twin.layer(momentum=1.0), twin.torchs(*twin.required(), **twin.options, momentum=1.0)
    step(layer, x.split(2))
    large(x)
    assert_close(layer, large)
    assert (large.running_var > 10_000).all() == twin.mixes_samples


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_do_not_cancel_at_a_large_offset(offset):
    """The bound is the rounding of the measured means, eps * offset, in deviations; none of it grows with k."""
    x = torch.randn(64, CHANNELS, dtype=torch.float64) + offset
    layer = nk.BatchNorm1d(CHANNELS, momentum=1.0)
    step(layer, x.float().split(4))
    exact = x.float().double()
    bound = 1e-6 + 4 * torch.finfo(torch.float32).eps * offset
    assert (layer.running_mean.double() - exact.mean(0)).abs().max() <= bound
    assert (layer.running_var.double() - exact.var(0)).abs().max() <= bound


POLICIES = {
    "Batch": nk.statistics.Batch(),
    "Ghost": nk.statistics.Ghost(2),
    "Running": nk.statistics.Running(),
    "Renorm": nk.statistics.Renorm(warmup=0),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_whatever_normalises_the_moments_of_the_input_are_pooled(policy, masked):
    x = off_scale((16, CHANNELS, 5), 1)
    mask = torch.rand(16, 5) < 0.7 if masked else torch.ones(16, 5, dtype=torch.bool)
    layer = nk.BatchNorm1d(CHANNELS, momentum=1.0, statistics=POLICIES[policy])
    with nk.accumulate_statistics(layer):
        for part, keep in zip(x.split(4), mask.split(4), strict=True):
            layer(part, mask=keep) if masked else layer(part)
    values = x.movedim(1, 2)[mask].double()
    wanted = nk.BatchNorm1d(CHANNELS).double()
    wanted.running_mean, wanted.running_var = values.mean(0), values.var(0)
    wanted.num_batches_tracked += 1
    assert_close(layer, wanted)


@pytest.mark.parametrize(
    ("momentum", "compiled"), [(0.1, False), (None, False), pytest.param(0.1, True, marks=pytest.mark.slow)]
)
def test_every_domain_and_step_pools_its_own_and_the_layer_pools_all(momentum, compiled):
    torch._dynamo.reset()
    layer = nk.BatchNorm1d(CHANNELS, momentum=momentum, statistics=nk.statistics.PerStep(3))
    run = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False) if compiled else layer
    own = [nn.BatchNorm1d(CHANNELS, momentum=momentum) for _ in range(2)]
    together = nn.BatchNorm1d(CHANNELS, momentum=momentum)
    for updates in range(2):
        batches = [off_scale((8, CHANNELS), 1), off_scale((8, CHANNELS), 1) * 2 + 3]
        with nk.accumulate_statistics(layer):
            for parts in zip(*(x.split(4) for x in batches), strict=True):
                for step_number, part in enumerate(parts):
                    run(part, step=step_number)
            assert layer.statistics_state.batches.tolist() == [updates, updates, 0]
        for norm, x in zip([*own, together], [*batches, torch.cat(batches)], strict=True):
            norm(x)
    assert_close(layer, together)
    state = layer.statistics_state
    assert state.batches.tolist() == [2, 2, 0]
    for row, norm in enumerate(own):
        norm_of_row = copy.deepcopy(norm)
        norm_of_row.running_mean, norm_of_row.running_var = state.mean[row], state.var[row]
        assert_close(norm_of_row, norm)


def test_momentum_none_weights_an_update_by_its_values():
    parts = [(4, 4, 2), (2, 3), (7,)]
    layer = nk.BatchNorm1d(CHANNELS, momentum=None)
    pooled = []
    for sizes in parts:
        x = off_scale((sum(sizes), CHANNELS), 1)
        pooled.append(x.double())
        step(layer, x.split(sizes))
    sizes = torch.tensor([len(x) for x in pooled], dtype=torch.float64)
    wanted = nk.BatchNorm1d(CHANNELS).double()
    wanted.running_mean = sum(len(x) * x.mean(0) for x in pooled) / sizes.sum()
    wanted.running_var = sum(len(x) * x.var(0) for x in pooled) / sizes.sum()
    wanted.num_batches_tracked += len(parts)
    assert_close(layer, wanted)
    assert layer.num_values_tracked == sizes.sum()


@each_tracking
def test_outputs_and_gradients_are_those_of_the_micro_batch_by_itself(twin):
    layer = twin.layer()
    other = copy.deepcopy(layer)
    x, upstream = twin.input(), torch.randn(twin.shape())
    results = []
    for each, around in ((layer, nk.accumulate_statistics(layer)), (other, nk.backend("auto"))):
        leaf = x.clone().requires_grad_()
        with around if each is layer else nk.backend(nk.explain(other, x).backend):
            y = each(leaf)
        y.backward(upstream)
        results.append({"y": y.detach(), "x": leaf.grad, **{n: p.grad for n, p in each.named_parameters()}})
    assert_same(*results)


# what does not go in


@each_tracking
def test_a_micro_batch_that_is_not_finite_is_left_out_and_counted(twin):
    x = twin.input(samples=9)
    bad = twin.input(samples=3)
    bad.view(-1)[5] = torch.nan
    layer, large = twin.layer(), twin.torchs(*twin.required(), **twin.options)
    step(layer, [x[:4], bad, x[4:]])
    large(x)
    assert_close(layer, large)
    assert layer.num_batches_skipped == 1
    before = statistics(layer)
    step(layer, [bad])
    assert_same(statistics(layer) | {"num_batches_skipped": 0}, before | {"num_batches_skipped": 0})
    assert layer.num_batches_skipped == 2


@each_tracking
def test_an_empty_micro_batch_and_an_update_without_one_change_nothing(twin):
    x = twin.input(samples=6)
    layer, large = twin.layer(), twin.torchs(*twin.required(), **twin.options)
    step(layer, [x[:4], x[:0], x[4:]])
    large(x)
    assert_close(layer, large)
    before = statistics(layer)
    step(layer, [])
    step(layer, [x[:0]])
    assert_same(statistics(layer), before)


def test_evaluation_in_between_neither_counts_nor_sees_what_waits():
    x = off_scale((8, CHANNELS), 1)
    layer, large = nk.BatchNorm1d(CHANNELS), nn.BatchNorm1d(CHANNELS)
    before = layer.eval()(x)
    with nk.accumulate_statistics(layer):
        layer.train()(x[:4])
        assert layer.eval()(x).equal(before)
        with nk.statistics_frozen(layer):
            layer.train()(x * 100)
        layer(x[4:])
    large(x)
    assert_close(layer, large)


def test_an_exception_drops_what_waits():
    layer = nk.BatchNorm1d(CHANNELS)
    before = statistics(layer)
    with pytest.raises(ZeroDivisionError):
        step(layer, (off_scale((8 // left, CHANNELS), 1) for left in (2, 1, 0)))
    assert_same(statistics(layer), before)
    x, large = off_scale((8, CHANNELS), 1), nn.BatchNorm1d(CHANNELS)
    layer(x), large(x)
    assert_close(layer, large)


def test_inner_contexts_join_the_outer_one():
    x = off_scale((12, CHANNELS), 1)
    model, large = nn.Sequential(nk.BatchNorm1d(CHANNELS)), nn.BatchNorm1d(CHANNELS)
    with nk.accumulate_statistics(model):
        step(model, x[:8].split(4))
        assert model[0].num_batches_tracked == 0
        model(x[8:])
    large(x)
    assert_close(model[0], large)


def test_a_copy_of_a_model_waits_for_nobody():
    layer = nk.BatchNorm1d(CHANNELS)
    with nk.accumulate_statistics(layer):
        other = copy.deepcopy(layer)
        other(off_scale((8, CHANNELS), 1))
    assert (layer.num_batches_tracked, other.num_batches_tracked) == (0, 1)


# the optimizer says when


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, CHANNELS), nk.BatchNorm1d(CHANNELS), nn.ReLU(), nn.Linear(CHANNELS, 1))


def accumulate(model: nn.Module, x: Tensor, micro: int = 4, scale=lambda loss: loss) -> None:
    for part in x.split(micro):
        scale(model(part).square().mean()).backward()


def seen_by_the_norm(model: nn.Module, x: Tensor) -> Tensor:
    return model[0](x).detach()


def test_every_step_of_the_optimizer_ends_an_update_until_the_handle_is_removed():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    listening = nk.accumulate_statistics(model, optimizer=optimizer)
    large = nn.BatchNorm1d(CHANNELS)
    for updates in range(1, 4):
        x = torch.randn(16, 4) * 3 + 1
        large(seen_by_the_norm(model, x))
        accumulate(model, x)
        assert model[1].num_batches_tracked == updates - 1
        optimizer.step()
        assert_close(model[1], large)
    accumulate(model, x)  # for a step that does not come
    listening.remove()
    listening.remove()
    assert_close(model[1], large)
    optimizer.step()
    assert_close(model[1], large)
    model(x)
    assert model[1].num_batches_tracked == 4


def test_one_of_several_optimizers_ends_the_update_and_the_others_find_nothing():
    model, x, large = network(), torch.randn(8, 4), nn.BatchNorm1d(CHANNELS)
    first, second = (torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 3))
    large(seen_by_the_norm(model, x))
    with nk.accumulate_statistics(model, optimizer=[first, second]):
        accumulate(model, x)
        first.step()
        before = statistics(model)
        second.step()
        assert_same(statistics(model), before)
    assert_close(model[1], large)
    assert model[1].num_batches_skipped == 0


def test_a_step_that_the_scaler_skips_leaves_its_micro_batches_to_the_next():
    model, large = network(), nn.BatchNorm1d(CHANNELS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    x = torch.randn(16, 4)
    large(seen_by_the_norm(model, x))
    with nk.accumulate_statistics(model, optimizer=optimizer):
        for half, factor in ((x[:8], torch.inf), (x[8:], 1.0)):
            optimizer.zero_grad()
            accumulate(model, half, scale=lambda loss: scaler.scale(loss) * factor)  # noqa: B023
            scaler.step(optimizer)
            scaler.update()
            assert model[1].num_batches_tracked == (factor == 1.0)
    assert_close(model[1], large)


def test_an_optimizer_that_steps_inside_the_backward_pass_ends_the_update_too():
    model, large = network(), nn.BatchNorm1d(CHANNELS)
    optimizers = {parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in model.parameters()}
    for parameter, optimizer in optimizers.items():
        parameter.register_post_accumulate_grad_hook(lambda p, optimizer=optimizer: optimizer.step())
    x = torch.randn(8, 4)
    large(seen_by_the_norm(model, x))
    with nk.accumulate_statistics(model, optimizer=list(optimizers.values())):
        accumulate(model, x, micro=8)
    assert_close(model[1], large)


def test_a_context_inside_joins_what_waits_for_the_optimizer():
    model, x, large = network(), torch.randn(8, 4), nn.BatchNorm1d(CHANNELS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    large(seen_by_the_norm(model, x))
    with nk.accumulate_statistics(model, optimizer=optimizer):
        with nk.accumulate_statistics(model):
            accumulate(model, x)
        assert model[1].num_batches_tracked == 0
        optimizer.step()
    assert_close(model[1], large)


def test_a_second_listener_is_refused_and_a_stranger_is_no_optimizer():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        nk.accumulate_statistics(model, optimizer=optimizer),
        pytest.raises(RuntimeError, match=r"wait for a step already.*\n.*remove\(\).*optimizer=\[first, second\]"),
    ):
        nk.accumulate_statistics(model, optimizer=optimizer)
    with pytest.raises(TypeError, match=r"optimizer=int is no torch.optim.Optimizer"):
        nk.accumulate_statistics(model, optimizer=[3])


@pytest.mark.parametrize(
    "context",
    [nk.statistics_frozen, nk.accumulate_statistics, functools.partial(nk.accumulate_statistics, optimizer=())],
)
def test_torchs_own_layers_are_named_and_nothing_is_done(context):
    model = nn.Sequential(nk.BatchNorm1d(2), nn.BatchNorm1d(2), nn.InstanceNorm1d(2), nn.SyncBatchNorm(2))
    with pytest.raises(TypeError) as error, context(model):
        pass
    message = str(error.value)
    assert "2 layers keep running statistics and are not normkit's; nothing was done." in message
    assert "  1: torch.nn.modules.batchnorm.BatchNorm1d\n  3: torch.nn.modules.batchnorm.SyncBatchNorm\n" in message
    assert "accelerate_(model)" in message
    assert model[0].hold.frozen == 0
    assert model[0].hold.pending is None
    accelerated = nn.Sequential(nn.BatchNorm1d(2))
    nk.accelerate_(accelerated)
    with context(accelerated):
        accelerated(torch.randn(4, 2))
    assert accelerated[0].num_batches_tracked == (context is nk.accumulate_statistics)


# the ways in which a layer is called


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", ["batch", "instance"])
def test_compiled_layers_accumulate_without_a_break_and_without_compiling_again(name, momentum):
    torch._dynamo.reset()
    options = {"affine": True, "track_running_stats": True} if name == "instance" else {}
    model = nn.Sequential(nn.Conv1d(3, CHANNELS, 1), nk.create(name, CHANNELS, dim=1, momentum=momentum, **options))
    other = copy.deepcopy(model)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=False)
    for _ in range(3):
        x = torch.randn(12, 3, 5) + 4
        for each, run in ((model, compiled), (other, other)):
            with nk.accumulate_statistics(each):
                for part in x.split(4):
                    run(part).square().mean().backward()
        assert_close(model[1], other[1])
    assert counter.frame_count == 1
    assert model[1].num_batches_tracked == (0 if name == "instance" else 3)


def test_fused_forwards_accumulate():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    large = copy.deepcopy(model)
    assert "fused" in nk.accelerate_(model).verdict
    x = torch.randn(8, 3, 5, 5)
    step(model, x.split(2))
    large(x)
    assert_close(model[1], large[1])


def test_lazy_layers_accumulate_from_their_first_input():
    layer, large, x = nk.LazyBatchNorm1d(), nn.BatchNorm1d(CHANNELS), off_scale((8, CHANNELS), 1)
    step(layer, x.split(4))
    large(x)
    assert_close(layer, large)


def test_buffers_may_change_their_place_between_the_handle_and_the_step():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with nk.accumulate_statistics(model, optimizer=optimizer):
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
        model.double()
        large = nn.BatchNorm1d(CHANNELS).double()
        x = torch.randn(8, 4, dtype=torch.float64)
        large(seen_by_the_norm(model, x))
        accumulate(model, x)
        optimizer.step()
        assert_close(model[1], large, 1e-12)


def pooled_over_ranks(rank: int) -> None:
    torch.manual_seed(0)
    x = off_scale((24, CHANNELS), 1)
    layer = nk.BatchNorm1d(CHANNELS, statistics=nk.statistics.Synchronized())
    large = nn.BatchNorm1d(CHANNELS)
    step(layer, x.split((10, 14))[rank].split(7 if rank else 5))
    large(x)
    assert_close(layer, large)


@pytest.mark.slow
def test_micro_batches_of_all_ranks_are_one_batch(tmp_path):
    spawn(2, tmp_path, pooled_over_ranks)


# momentum=None by itself


@each_tracking
def test_momentum_none_is_torchs_bit_for_bit_where_batches_are_equal(twin):
    ours, torchs = twin.pair(momentum=None)
    with nk.backend("torch"):
        for _ in range(7):
            x = twin.input()
            assert ours(x).equal(torchs(x))
            for name in STATISTICS:
                mine, other = getattr(ours, name), getattr(torchs, name)
                assert mine.equal(other), name


@pytest.mark.parametrize("compiled", [False, True])
def test_momentum_none_weights_batches_by_their_values(compiled):
    torch._dynamo.reset()
    layer = nk.BatchNorm1d(CHANNELS, momentum=None)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False) if compiled else layer
    batches = [off_scale((size, CHANNELS), 1) for size in (2, 31, 5)]
    for x in batches:
        run(x)
    total = sum(map(len, batches))
    wanted = nk.BatchNorm1d(CHANNELS).double()
    wanted.running_mean = torch.cat(batches).double().mean(0)
    wanted.running_var = sum(len(x) * x.double().var(0) for x in batches) / total
    wanted.num_batches_tracked += len(batches)
    assert_close(layer, wanted)
    assert layer.num_values_tracked == total


def test_momentum_none_goes_on_from_a_checkpoint_that_tells_of_batches_only():
    """Those count as many values as the first batch after it: with equal batches, what never stopped would have."""
    whole, first, second = (nk.BatchNorm1d(CHANNELS, momentum=None) for _ in range(3))
    batches = [off_scale((8, CHANNELS), 1) for _ in range(6)]
    for i, x in enumerate(batches):
        whole(x)
        if i == 3:
            second.load_state_dict(first.state_dict())
        (first if i < 3 else second)(x)
        assert_same((first if i < 3 else second).state_dict(), whole.state_dict())
    assert second.num_values_tracked == whole.num_values_tracked
