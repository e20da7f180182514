"""Rows of docs/conformance.md that are about statistics: first shown on torch, then what normkit does about it.

A test whose name begins with test_torch goes red when torch mends the thing; then docs/conformance.md wants a new line.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import normkit as nk
from processes import spawn
from twins import CHANNELS, TRACKING, Twin, assert_same

each_tracking = pytest.mark.parametrize("twin", [t for t in TRACKING if all(t.options.values())], ids=str)
each_backend = pytest.mark.usefixtures("a_backend_that_may_run")


@pytest.fixture(params=["auto", "torch"])
def a_backend_that_may_run(request):
    with nk.backend(request.param):
        yield


def statistics(layer: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in layer.state_dict().items() if name.startswith(("running", "num"))}


# Row 1: activation checkpointing runs a forward pass twice; all that there is to it is in test_checkpointing.py.

each_mode = pytest.mark.parametrize("use_reentrant", [True, False])


def one_step_of(layer: nn.Module, use_reentrant: bool | None) -> dict[str, Tensor]:
    x = (torch.randn(8, CHANNELS, generator=torch.Generator().manual_seed(1)) + 3).requires_grad_()
    y = layer(x) if use_reentrant is None else checkpoint(layer, x, use_reentrant=use_reentrant)
    y.square().sum().backward()
    return statistics(layer)


@each_mode
def test_torch_row_1_checkpointing_counts_a_batch_twice(use_reentrant):
    once, twice = (one_step_of(nn.BatchNorm1d(CHANNELS), mode) for mode in (None, use_reentrant))
    assert (once["num_batches_tracked"], twice["num_batches_tracked"]) == (1, 2)
    assert (twice["running_mean"] / once["running_mean"] - 1.9).abs().max() < 1e-5  # 1 - 0.9², not 1 - 0.9


@each_backend
@each_mode
def test_normkit_row_1_checkpointing_counts_a_batch_once(use_reentrant):
    wanted = one_step_of(nn.BatchNorm1d(CHANNELS), None)
    with nk.backend("torch"):  # the same numbers bit for bit
        assert_same(one_step_of(nk.BatchNorm1d(CHANNELS), use_reentrant), wanted)
    assert one_step_of(nk.BatchNorm1d(CHANNELS), use_reentrant)["num_batches_tracked"] == 1


# Row 2: micro-batches; all that there is to it is in test_accumulation.py.


def test_torch_row_2_four_micro_batches_move_the_statistics_four_times():
    x = torch.randn(16, CHANNELS) + 3
    large, micro = nn.BatchNorm1d(CHANNELS), nn.BatchNorm1d(CHANNELS)
    large(x)
    for part in x.chunk(4):
        micro(part)
    assert (large.num_batches_tracked, micro.num_batches_tracked) == (1, 4)
    share = micro.running_mean / x.mean(0)
    assert (share - 0.344).abs().max() < 0.1  # 1 - 0.9⁴: the effective momentum


@each_backend
def test_normkit_row_2_four_micro_batches_move_the_statistics_once_and_as_one_batch():
    x = torch.randn(16, CHANNELS) + 3
    large, micro = nn.BatchNorm1d(CHANNELS), nk.BatchNorm1d(CHANNELS)
    large(x)
    with nk.accumulate_statistics(micro):
        for part in x.chunk(4):
            micro(part)
    for name, value in statistics(large).items():
        assert (getattr(micro, name) - value).abs().max() <= 1e-6 * value.abs().max(), name


# Row 11: what torch's converter to synchronised batch norm drops.


class Shifted(nn.BatchNorm2d):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 100


def with_a_hook_a_subclass_and_a_shared_layer() -> nn.Module:
    hooked, shared = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    hooked.register_forward_hook(lambda module, args, output: output + 1000)
    return nn.Sequential(hooked, Shifted(2), nn.Sequential(shared), nn.Sequential(shared)).eval()


def test_torch_row_11_converting_drops_hooks_and_the_forward_of_a_subclass_and_doubles_a_shared_layer():
    model = with_a_hook_a_subclass_and_a_shared_layer()
    x = torch.randn(2, 2, 3, 3)
    assert model(x).min() > 50
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert not converted[0]._forward_hooks
    assert converted(x).max() < 50
    assert converted[2][0] is not converted[3][0]


def test_normkit_row_11_sync_keeps_hooks_subclasses_and_shared_layers():
    model = with_a_hook_a_subclass_and_a_shared_layer()
    x = torch.randn(2, 2, 3, 3)
    before = model(x)
    certificate = nk.sync_(model, example_inputs=x)
    assert len(model[0]._forward_hooks) == 1
    assert type(model[1]) is Shifted
    assert "is a subclass of BatchNorm2d" in certificate.refused[0].reason
    assert model[2][0] is model[3][0]
    assert isinstance(model[2][0].statistics, nk.statistics.Synchronized)
    assert torch.allclose(model(x), before)


# Row 12: under DistributedDataParallel the statistics of rank 0 win.


def two_steps(norm: nn.Module, rank: int, **options: bool) -> nn.Module:
    """One rank sees a mean of 0, the other one of 10."""
    wrapped = nn.parallel.DistributedDataParallel(norm, **options)
    for seed in (0, 1):
        x = torch.randn(64, 2, generator=torch.Generator().manual_seed(seed)) + 10 * rank
        wrapped(x).sum().backward()
    return norm


def torch_row_12(rank: int) -> None:
    alone = nn.BatchNorm1d(2)
    for seed in (0, 1):
        alone(torch.randn(64, 2, generator=torch.Generator().manual_seed(seed)))
    norm = two_steps(nn.BatchNorm1d(2), rank)
    if rank == 0:
        assert torch.equal(norm.running_mean, alone.running_mean)  # what rank 1 saw has left no trace
        assert norm.running_mean.abs().max() < 0.1


def normkit_row_12(rank: int) -> None:
    """The mean of both is 5, the variance 1 + 5²; after two steps at momentum 0.1 the running mean is 0.95."""
    synchronised = nn.BatchNorm1d(2)
    nk.sync_(synchronised)
    two_steps(synchronised, rank)
    own = nn.BatchNorm1d(2)
    merged = two_steps(own, rank, broadcast_buffers=False)
    between = ((own.running_mean - 0.95) ** 2).max()
    nk.merge_statistics_(merged)
    for norm in (synchronised, merged):
        assert (norm.running_mean - 0.95).abs().max() < 0.05
    assert (synchronised.running_var - (0.81 + 0.19 * 26)).abs().max() < 0.5
    assert (merged.running_var - (1 + between)).abs().max() < 0.1


def row_12(rank: int) -> None:
    torch_row_12(rank)
    normkit_row_12(rank)


@pytest.mark.slow
def test_torch_row_12_the_statistics_of_rank_0_win_and_normkit_row_12_those_of_all_ranks_count(tmp_path):
    spawn(2, tmp_path, row_12)


# Row 13: parameters are frozen, statistics move.


@each_backend
@pytest.mark.parametrize("whose", ["ours", "torchs"])
@each_tracking
def test_row_13_freezing_the_parameters_does_not_freeze_the_statistics_in_either(twin, whose):
    """As in torch: whether weight and bias train is another question than whether the statistics move."""
    layer = dict(zip(("ours", "torchs"), twin.pair(), strict=True))[whose].requires_grad_(False)
    layer(twin.input())
    assert layer.running_mean.abs().min() > 0
    assert not layer(twin.input()).requires_grad


@each_backend
@each_tracking
def test_normkit_row_13_freeze_stops_both(twin):
    layer = twin.layer()
    layer(twin.input())
    nk.freeze_(layer)
    before = statistics(layer)
    assert not layer.train()(twin.input()).requires_grad
    assert_same(statistics(layer), before)


# Row 14: the variance that normalises is not the one that is kept.


@each_backend
@pytest.mark.parametrize("namespace", [nn, nk], ids=["torch", "normkit"])
def test_row_14_training_and_evaluation_differ_on_the_same_batch_in_both(namespace):
    """As in torch: two values are ±1 by the biased variance, and ±sqrt(1/2) by the unbiased one that is kept."""
    layer = namespace.BatchNorm1d(1, momentum=1.0, eps=1e-12)
    x = torch.tensor([[1.0], [3.0]])
    bound = 4 * torch.finfo(torch.float32).eps
    assert (layer(x).flatten() - torch.tensor([-1.0, 1.0])).abs().max() <= bound
    assert (layer.eval()(x).flatten() - torch.tensor([-0.5, 0.5]).sign() * 0.5**0.5).abs().max() <= bound


# Row 17: an exponential average of the buffers truncates the counter.


def averaged(layer: nn.Module, use_buffers: bool) -> tuple[nn.Module, nn.Module]:
    """A layer after ten batches, and the average of its states."""
    average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=use_buffers)
    for _ in range(10):
        layer(torch.randn(8, CHANNELS))
        average.update_parameters(layer)
    return layer, average.module


@pytest.mark.parametrize("namespace", [nn, nk], ids=["torch", "normkit"])
def test_row_17_an_exponential_average_truncates_the_counter_in_both(namespace):
    """The counter has to stay an integer in the state_dict, and the tool interpolates every buffer."""
    layer, average = averaged(namespace.BatchNorm1d(CHANNELS), use_buffers=True)
    assert (layer.num_batches_tracked, average.num_batches_tracked) == (10, 1)


@pytest.mark.parametrize("namespace", [nn, nk], ids=["torch", "normkit"])
def test_row_17_without_use_buffers_the_counter_is_copied_in_both(namespace):
    layer, average = averaged(namespace.BatchNorm1d(CHANNELS), use_buffers=False)
    assert_same(statistics(average), statistics(layer))


def test_row_17_the_outputs_of_the_averaged_layer_do_not_depend_on_the_counter():
    _, average = averaged(nk.BatchNorm1d(CHANNELS), use_buffers=True)
    x = torch.randn(8, CHANNELS)
    before = average.eval()(x)
    average.num_batches_tracked.fill_(10)
    assert average(x).equal(before)


# Row 20: one bad batch.


def poisoned(twin: Twin, value: float) -> Tensor:
    x = twin.input()
    x.view(-1)[3] = value
    return x


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@each_tracking
def test_torch_row_20_statistics_do_not_survive_a_value_that_is_not_finite(twin, value):
    _, layer = twin.pair()
    layer(poisoned(twin, value))
    for _ in range(20):
        layer(twin.input())
    assert not layer.running_mean.isfinite().all()
    assert not layer.eval()(twin.input()).isfinite().all()


@each_backend
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@each_tracking
def test_normkit_row_20_statistics_and_counter_stay_as_they_were_and_the_batch_is_counted_apart(twin, value, momentum):
    layer = twin.layer(momentum=momentum)
    layer(twin.input())
    before, bad = statistics(layer), poisoned(twin, value)
    y = layer(bad)
    assert not y.isfinite().all()  # the output shows it, as in torch
    assert_same(statistics(layer), before)
    assert layer.num_batches_skipped.item() == 1
    assert "num_batches_skipped" not in layer.state_dict()
    untouched = twin.layer(momentum=momentum)
    untouched.load_state_dict(layer.state_dict())
    x = twin.input()
    layer(x), untouched(x)
    assert_same(statistics(layer), statistics(untouched))
    assert layer.num_batches_skipped.item() == 1
    assert layer.eval()(x).isfinite().all()
    layer.reset_running_stats()
    assert layer.num_batches_skipped.item() == 0


@each_backend
@each_tracking
def test_normkit_row_20_the_functional_form_leaves_the_statistics_alone_too(twin):
    function = getattr(nk.functional, twin.spec.name)
    mean, var = torch.full((CHANNELS,), 0.5), torch.full((CHANNELS,), 2.0)
    arguments = {"training": True} if twin.mixes_samples else {}
    function(poisoned(twin, torch.nan), mean, var, **arguments)
    assert mean.equal(torch.full((CHANNELS,), 0.5))
    assert var.equal(torch.full((CHANNELS,), 2.0))
    function(twin.input(), mean, var, **arguments)
    assert not mean.equal(torch.full((CHANNELS,), 0.5))


@each_backend
@each_tracking
def test_normkit_row_20_an_overflowing_variance_is_not_let_in_either(twin):
    """Finite values whose squares are not: what a narrow type meets first."""
    layer = twin.layer()
    layer(twin.input() * 1e30)
    assert layer.running_var.isfinite().all()
    assert layer.num_batches_skipped.item() == 1


# Row 21: low-precision buffers: what follows from them.


@each_tracking
def test_torch_row_21_buffers_become_as_narrow_as_the_model(twin):
    _, layer = twin.pair()
    assert layer.bfloat16().running_var.dtype == torch.bfloat16


@each_backend
@each_tracking
def test_normkit_row_21_buffers_stay_float32_beside_narrow_parameters(twin):
    layer = twin.layer().bfloat16()
    layer(twin.input(dtype=torch.bfloat16))
    assert layer.running_var.dtype == layer.running_mean.dtype == torch.float32
    assert layer.eval()(twin.input(dtype=torch.bfloat16)).dtype == torch.bfloat16


def trained(layer: nn.Module, x: Tensor, steps: int) -> Tensor:
    with torch.no_grad():
        for _ in range(steps):
            layer(x)
    return layer.running_var


STEPS, MOMENTUM = 3000, 1e-3


def three_valued() -> tuple[Tensor, float]:
    """(n, 1) and the unbiased variance, which bfloat16 holds: 9."""
    x = torch.tensor([[-3.0], [0.0], [3.0]], dtype=torch.bfloat16)
    return x, 9.0


def test_torch_row_21_running_var_in_bfloat16_stalls():
    """Reproduced on the pinned torch; red when torch mends it. The last bit of 4 is 1/32, and a step is smaller."""
    x, truth = three_valued()
    running = trained(nn.BatchNorm1d(1, momentum=MOMENTUM).bfloat16(), x, STEPS)
    assert running.item() < truth / 2


@each_backend
def test_normkit_row_21_running_var_of_a_bfloat16_layer_does_not_stall():
    """It is the moving average in float32: an error of half an epsilon of the largest value per step."""
    x, truth = three_valued()
    running = trained(nk.BatchNorm1d(1, momentum=MOMENTUM).bfloat16(), x, STEPS)
    exact = truth + (1 - truth) * (1 - MOMENTUM) ** STEPS
    assert abs(running.item() - exact) <= STEPS * torch.finfo(torch.float32).eps * truth
