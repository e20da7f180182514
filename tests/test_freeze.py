"""freeze_ and unfreeze_, and statistics_frozen: what stays, what comes back, and who is told."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import normkit as nk
from normkit.vocabulary.certificate import Certificate
from twins import CHANNELS, TRACKING, assert_same, off_scale

each_tracking = pytest.mark.parametrize("twin", [t for t in TRACKING if all(t.options.values())], ids=str)


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def state(model: nn.Module) -> list:
    """All that freezing may touch: class, what is registered and what it trains, plain attributes."""
    return [
        (
            type(m),
            {k: v for k, v in vars(m).items() if isinstance(v, int | float | str | tuple | None)},
            list(m._buffers),
        )
        for m in model.modules()
    ] + [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]


def settled(model: nn.Module, *shape: int) -> nn.Module:
    """With running statistics of its own."""
    for _ in range(3):
        model.train()(torch.randn(shape) * 2 + 1)
    return model


def network(namespace=nk) -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        namespace.BatchNorm2d(4),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 4, 3), namespace.InstanceNorm2d(4, affine=True, track_running_stats=True)),
        namespace.GroupNorm(2, 4),
        namespace.BatchNorm2d(4, affine=False),
        namespace.BatchNorm2d(4, track_running_stats=False),
    )
    return settled(model, 6, 3, 9, 9)


FROZEN = ("1", "3.1", "5")


# freeze_


@each_tracking
def test_a_frozen_layer_in_training_is_the_layer_in_evaluation(twin):
    layer = twin.layer()
    layer(twin.input()), layer(twin.input())
    x, upstream = twin.input(), torch.randn(twin.shape())
    wanted = layer.eval()(leaf := x.clone().requires_grad_())
    wanted.backward(upstream)
    nk.freeze_(layer, affine=False)
    before = buffers(layer)
    got = layer.train()(mine := x.clone().requires_grad_())
    got.backward(upstream)
    assert got.equal(wanted)
    assert mine.grad.equal(leaf.grad)
    assert_same(buffers(layer), before)
    assert layer.training


@pytest.mark.parametrize("namespace", [nn, nk], ids=["torch", "normkit"])
def test_statistics_and_affine_are_frozen_and_the_rest_is_listed(namespace):
    model = network(namespace)
    classes = [type(m) for m in model.modules()]
    certificate = nk.freeze_(model, example_inputs=torch.randn(2, 3, 9, 9))
    assert isinstance(certificate, Certificate)
    frozen = {p.module: p.detail for p in certificate.changed if "frozen" in p.action}
    assert frozen == dict(zip(FROZEN, ["statistics, weight, bias"] * 2 + ["statistics"], strict=True))
    left = {row.module: row.reason for row in certificate.skipped}
    assert set(left) == {"4", "6"}
    assert "keeps no running statistics" in left["4"]
    assert certificate.agreement[0].training is False
    assert len(certificate.agreement) == 1
    for module, kind in zip(model.modules(), classes, strict=True):
        assert isinstance(module, kind)
        assert type(module).__name__ == kind.__name__
    before = buffers(model)
    model.train()
    model(torch.randn(5, 3, 9, 9) * 9).square().mean().backward()
    assert_same(buffers(model), before)
    for name in FROZEN:
        layer = model.get_submodule(name)
        assert layer.frozen
        assert "frozen=True" in repr(layer)
        assert all(p.grad is None and not p.requires_grad for p in layer.parameters())
    assert model[0].weight.grad is not None
    assert model[4].weight.grad is not None


def test_frozen_layers_stay_frozen_through_train_pickle_copy_and_the_checkpoint():
    model = network()
    nk.freeze_(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    others = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model), torch.load(stored, weights_only=False)]
    for each in (model, *others):
        before = buffers(each)
        each.eval().train()(torch.randn(5, 3, 9, 9) * 9)
        assert_same(buffers(each), before)
        assert not each[1].weight.requires_grad
        nk.unfreeze_(each)
        assert each[1].weight.requires_grad
    nk.freeze_(model)
    plain = network(nn)
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())
    assert model[1].frozen


def test_an_optimizer_does_not_move_what_is_frozen():
    """Neither by a gradient that waits, nor by momentum and weight decay."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        model(torch.randn(5, 3, 9, 9)).square().mean().backward()
        optimizer.step()
    nk.freeze_(model, optimizer=optimizer)
    weight, other = model[1].weight.clone(), model[0].weight.clone()
    for set_to_none in (False, True):
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        model(torch.randn(5, 3, 9, 9)).square().mean().backward()
        optimizer.step()
    assert model[1].weight.equal(weight)
    assert not model[0].weight.equal(other)


@pytest.mark.parametrize("policy", [nk.statistics.Ghost(2), nk.statistics.Running(), nk.statistics.Renorm(warmup=0)])
def test_a_frozen_layer_does_what_evaluation_does_whatever_its_policy(policy):
    layer = nk.BatchNorm1d(CHANNELS, statistics=policy)
    layer(off_scale((8, CHANNELS), 1))
    nk.freeze_(layer)
    before, x = buffers(layer), off_scale((8, CHANNELS), 1)
    assert layer(x).equal(copy.deepcopy(layer).eval()(x))
    assert layer(x[:1]).shape == (1, CHANNELS)
    assert_same(buffers(layer), before)


def test_a_frozen_model_compiles_whole_and_a_thawed_one_again():
    torch._dynamo.reset()
    model, x = nn.Sequential(nk.BatchNorm1d(CHANNELS)), off_scale((8, CHANNELS), 1)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    run(x)
    nk.freeze_(model)
    before = buffers(model)
    assert (run(x) - copy.deepcopy(model).eval()(x)).abs().max() < 1e-5 * x.abs().max()
    assert_same(buffers(model), before)
    nk.unfreeze_(model)
    run(x)
    assert model[0].num_batches_tracked == 2


def test_a_fused_forward_takes_the_frozen_layer_as_it_is():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    settled(model, 6, 3, 5, 5)
    nk.accelerate_(model)
    x = torch.randn(6, 3, 5, 5)
    nk.freeze_(model, example_inputs=x)
    before, wanted = buffers(model), model.eval()(x)
    assert model.train()(x).equal(wanted)
    assert_same(buffers(model), before)


# one switch at a time, twice, back


@pytest.mark.parametrize("namespace", [nn, nk], ids=["torch", "normkit"])
@pytest.mark.parametrize(("statistics", "affine"), [(True, True), (True, False), (False, True)])
def test_one_switch_at_a_time_and_the_certificate_takes_it_back(namespace, statistics, affine):
    model = network(namespace)
    model[1].bias.requires_grad = False
    model[1].weight.grad = torch.ones(4)
    before = state(model)
    certificate = nk.freeze_(model, statistics=statistics, affine=affine, example_inputs=torch.randn(2, 3, 9, 9))
    modes = [row.training for row in certificate.agreement]
    assert modes == ([False] if statistics else [False, True])  # affine alone changes no output
    layer = model[1]
    assert layer.frozen == statistics
    assert layer.weight.requires_grad != affine
    assert (layer.weight.grad is None) == affine
    certificate.undo()
    assert state(model) == before
    assert model[1].weight.grad.equal(torch.ones(4))
    with pytest.raises(RuntimeError, match="already taken back"):
        certificate.undo()


@pytest.mark.parametrize("namespace", [nn, nk], ids=["torch", "normkit"])
def test_twice_is_once_and_unfreezing_restores_what_was(namespace):
    model = network(namespace)
    model[1].bias.requires_grad = False
    nk.freeze_(model[1:2])
    nk.unfreeze_(model[1:2])
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    kinds = [type(m).__name__ for m in model.modules()]
    nk.freeze_(model)
    once = state(model)
    certificate = nk.freeze_(model)
    assert state(model) == once
    assert certificate.changed == ()
    assert {row.reason for row in certificate.skipped if row.module in FROZEN} == {"is frozen already"}
    nk.unfreeze_(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains
    assert [type(m).__name__ for m in model.modules()] == kinds
    assert not any(getattr(m, "frozen", False) or getattr(m, "frozen_parameters", ()) for m in model.modules())
    assert nk.unfreeze_(model).changed == ()
    before = buffers(model)
    model(torch.randn(5, 3, 9, 9))
    assert not model[1].running_mean.equal(before["1.running_mean"])


def test_switches_come_back_one_by_one():
    layer = nk.BatchNorm1d(2)
    nk.freeze_(layer)
    nk.unfreeze_(layer, affine=False)
    assert (layer.frozen, layer.weight.requires_grad) == (False, False)
    nk.freeze_(layer, affine=False)
    nk.unfreeze_(layer, statistics=False)
    assert (layer.frozen, layer.weight.requires_grad, layer.bias.requires_grad) == (True, True, True)
    layer.bias.requires_grad_(False)
    nk.freeze_(layer)
    layer.weight.requires_grad_(True)  # somebody else let it train again
    nk.freeze_(layer)
    assert not layer.weight.requires_grad
    nk.unfreeze_(layer)
    assert (layer.frozen, layer.weight.requires_grad, layer.bias.requires_grad) == (False, True, False)


def test_undo_refuses_once_the_layer_was_unfrozen():
    model = network()
    certificate = nk.freeze_(model)
    nk.unfreeze_(model)
    with pytest.raises(RuntimeError, match="frozen or unfrozen since"):
        certificate.undo()


def test_the_filter_chooses_layers_by_object_and_name():
    model = network()
    certificate = nk.freeze_(model, filter_fn=lambda module, name: name == "1" or isinstance(module, nk.InstanceNorm2d))
    assert [p.module for p in certificate.changed] == ["1", "3.1"]
    assert {row.module: row.reason for row in certificate.skipped}["5"] == "filter_fn left it out"
    nk.unfreeze_(model, filter_fn=lambda module, name: name == "1")
    assert (model[1].frozen, model[3][1].frozen) == (False, True)


# who is told


class Own(nn.BatchNorm2d):
    """A subclass that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_a_layer_that_cannot_be_frozen_is_named_and_nothing_changes():
    parametrized = nn.utils.parametrizations.weight_norm(nk.BatchNorm2d(4), dim=None)
    model = nn.Sequential(nn.BatchNorm2d(4), Own(4), parametrized)
    before = state(model)
    with pytest.raises(TypeError) as error:
        nk.freeze_(model)
    message = str(error.value)
    assert message.startswith("freeze_: 2 layers cannot be frozen; nothing was changed.\n  1: ")
    assert "is a subclass of BatchNorm2d and may compute something else\n  2: it has parametrizations" in message
    assert "leave them out with filter_fn=" in message
    assert state(model) == before
    nk.freeze_(model, filter_fn=lambda module, name: name == "0")
    assert model[0].frozen


def test_torchs_synchronised_layer_is_frozen_and_stays_synchronised():
    model = nn.Sequential(nn.SyncBatchNorm(4))
    nk.freeze_(model)
    assert type(model[0]) is nk.SyncBatchNorm
    assert isinstance(model[0], nn.SyncBatchNorm)
    before = buffers(model)
    assert model.train()(torch.randn(1, 4)).shape == (1, 4)
    assert_same(buffers(model), before)
    nk.unfreeze_(model)
    assert isinstance(model[0].statistics, nk.statistics.Synchronized)


def test_nothing_to_freeze_and_no_module_are_errors():
    with pytest.raises(ValueError, match="freeze_: statistics=False and affine=False leave nothing to do"):
        nk.freeze_(nk.BatchNorm1d(2), statistics=False, affine=False)
    with pytest.raises(TypeError, match=r"unfreeze_: .*is not a torch\.nn\.Module"):
        nk.unfreeze_([nk.BatchNorm1d(2)])


def test_a_parameter_that_two_layers_share_is_frozen_under_all_its_names():
    model = nn.Sequential(nk.BatchNorm1d(2), nk.BatchNorm1d(2))
    model[1].weight = model[0].weight
    nk.freeze_(model)
    assert not model[0].weight.requires_grad
    nk.unfreeze_(model)
    assert model[1].weight.requires_grad


def test_under_data_parallel_only_the_statistics_may_be_frozen():
    """Its list of gradients was made when it wrapped the model."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        wrapped = nn.parallel.DistributedDataParallel(model)
        with pytest.raises(TypeError, match=r"wrapped in DistributedDataParallel.*\n.*affine=False"):
            nk.freeze_(wrapped)
        assert type(model[1]) is nn.BatchNorm1d
        nk.freeze_(wrapped, affine=False)
        before = buffers(model)
        for _ in range(2):
            wrapped(torch.randn(5, 3)).square().mean().backward()
        assert_same(buffers(model), before)
        nk.unfreeze_(wrapped, affine=False)
        nk.freeze_(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            wrapped(torch.randn(5, 3)).square().mean().backward()
        with pytest.raises(TypeError, match="unfreeze_: the model is wrapped"):
            nk.unfreeze_(wrapped)
    finally:
        dist.destroy_process_group()


# statistics_frozen


@each_tracking
def test_forwards_inside_normalise_as_ever_and_leave_statistics_and_counters(twin):
    layer = twin.layer()
    layer(twin.input())
    before, x = buffers(layer), twin.input()
    wanted = copy.deepcopy(layer)(x)
    bad = x.clone()
    bad.view(-1)[0] = torch.nan
    with nk.statistics_frozen(layer):
        assert layer(x).equal(wanted)
        layer(bad)
        with nk.statistics_frozen(layer):
            layer(x)
        layer(x)
        assert_same(buffers(layer), before)
    layer(x)
    assert not layer.running_mean.equal(before["running_mean"])


def test_one_model_is_frozen_and_the_others_are_not_and_an_exception_ends_it():
    one, two, x = nn.Sequential(nk.BatchNorm1d(2)), nn.Sequential(nk.BatchNorm1d(2)), torch.randn(4, 2)
    with pytest.raises(RuntimeError, match="shape"), nk.statistics_frozen(one):
        one(two(x)).reshape(3)
    assert (one[0].num_batches_tracked, two[0].num_batches_tracked) == (0, 1)
    one(x)
    assert one[0].num_batches_tracked == 1


def test_it_may_decorate_a_function():
    model = nk.BatchNorm1d(2)

    @nk.statistics_frozen(model)
    def penalty(x: Tensor) -> Tensor:
        return model(x)

    penalty(torch.randn(4, 2)), penalty(torch.randn(4, 2))
    assert model.num_batches_tracked == 0
    model(torch.randn(4, 2))
    assert model.num_batches_tracked == 1


@pytest.mark.parametrize("policy", [nk.statistics.Ghost(2), nk.statistics.Running(), nk.statistics.Renorm(warmup=0)])
def test_statistics_frozen_holds_for_every_policy(policy):
    layer, x = nk.BatchNorm1d(CHANNELS, statistics=policy), off_scale((8, CHANNELS), 1)
    layer(x)
    before = layer.state_dict() | {"values": layer.num_values_tracked}
    before = {name: value.clone() for name, value in before.items()}
    with nk.statistics_frozen(layer):
        layer(x * 3)
    assert_same(layer.state_dict() | {"values": layer.num_values_tracked}, before)


def test_a_compiled_model_is_told_at_every_call():
    torch._dynamo.reset()
    model, x = nn.Sequential(nk.BatchNorm1d(CHANNELS)), off_scale((8, CHANNELS), 1)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    counts = []
    for held in (False, True, False, True):
        if held:
            with nk.statistics_frozen(model), nk.statistics_frozen(model):
                run(x)
        else:
            run(x)
        counts.append(model[0].num_batches_tracked.item())
    assert counts == [1, 1, 2, 2]
