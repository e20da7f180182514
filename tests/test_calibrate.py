"""nk.calibrate_: the statistics of the data, exactly, and nothing else changed."""

from __future__ import annotations

import copy
from collections import UserDict

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import normkit as nk
from processes import spawn

each_library = pytest.mark.parametrize("library", [nn, nk], ids=["torch's layers", "normkit's layers"])
TIGHT = {"rtol": 1e-5, "atol": 1e-5}


def batches(*sizes: int, channels: int = 3, space: tuple[int, ...] = (4, 4)) -> list[Tensor]:
    """Off-centre, off-scale, every batch at another level."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randn(n, channels, *space, generator=generator)
    return [draw(n) * (1 + level) + 3 * level for level, n in enumerate(sizes)]


def network(library=nn) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        library.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(6, 4, 1),
        library.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(16, 2),
    )


def by_hand(model: nn.Sequential, data: list[Tensor], place: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of everything that comes by one layer while batches normalise and nothing drops out."""
    model = copy.deepcopy(model).eval()
    came = []
    with torch.no_grad():
        for x in data:
            for module in model[:place]:
                if isinstance(module, nn.BatchNorm2d):
                    x = nn.functional.batch_norm(x, None, None, module.weight, module.bias, True)
                else:
                    x = module(x)
            came.append(x.double())
    all_of_it = torch.cat(came)
    return all_of_it.mean((0, 2, 3)), all_of_it.var((0, 2, 3))


@each_library
def test_every_layer_gets_the_moments_of_all_values_together(library):
    model, data = network(library), batches(5, 2, 9)
    certificate = nk.calibrate_(model, data)
    for place in (1, 5):
        mean, var = by_hand(model, data, place)
        torch.testing.assert_close(model[place].running_mean.double(), mean, **TIGHT)
        torch.testing.assert_close(model[place].running_var.double(), var, **TIGHT)
        assert model[place].num_batches_tracked == 3
    assert [row.module for row in certificate.changed] == ["1", "5"]


def test_far_from_zero_no_digits_are_lost():
    layer, data = nn.BatchNorm1d(1), [torch.randn(n, 1) + 1e4 for n in (50, 3)]
    nk.calibrate_(layer, data)
    wanted = torch.cat(data).double().var()
    assert abs(layer.running_var.item() / wanted.item() - 1) < 1e-4


# What a loader may be.


def test_a_generator_is_read_no_further_than_asked():
    layer, read = nn.BatchNorm1d(2), []

    def generate():
        for n in range(100):
            read.append(n)
            yield torch.full((2, 2), float(n))

    nk.calibrate_(layer, generate(), steps=3)
    assert read == [0, 1, 2]
    assert layer.running_mean.tolist() == [1.0, 1.0]


def test_a_short_loader_is_used_up_and_the_certificate_says_so():
    layer = nn.BatchNorm1d(2)
    certificate = nk.calibrate_(layer, [torch.randn(4, 2)], steps=10)
    assert "statistics of 1 batch, and not the 10 that were asked for" in certificate.notes
    assert "not the" not in nk.calibrate_(layer, [torch.randn(4, 2)], steps=None).notes[0]


class Two(nn.Module):
    """Takes two tensors, by position or by name."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.norm(left + right)


def pair() -> tuple[Tensor, Tensor]:
    return torch.ones(4, 2), torch.randn(4, 2)


@pytest.mark.parametrize(
    "make",
    [
        lambda left, right: ((left, right), "target"),
        lambda left, right: ({"left": left, "right": right, "other": 3}, "target"),
        lambda left, right: {"right": right, "left": left, "labels": torch.zeros(4)},
        lambda left, right: UserDict(left=left, right=right),
        lambda left, right: [(left, right)],
    ],
)
def test_batches_are_understood(make):
    model, (left, right) = Two(), pair()
    nk.calibrate_(model, [make(left, right)])
    torch.testing.assert_close(model.norm.running_mean, (left + right).mean(0))


def test_custom_batches_go_through_call():
    model, (left, right) = Two(), pair()
    nk.calibrate_(model, ["four", "samples"], call=lambda m, text: m(left, right))
    torch.testing.assert_close(model.norm.running_mean, (left + right).mean(0))
    with pytest.raises(TypeError, match=r"(?s)a batch is a str.*call=lambda model, batch"):
        nk.calibrate_(model, ["four"])
    with pytest.raises(TypeError, match=r"the keys image, label, and the forward of Two takes left, right"):
        nk.calibrate_(model, [{"image": left, "label": 0}])


def test_what_cannot_be_is_said():
    layer = nn.BatchNorm1d(2)
    with pytest.raises(ValueError, match="the loader gave no batch; nothing was changed"):
        nk.calibrate_(layer, [])
    with pytest.raises(ValueError, match="steps=0; it is a number of batches, 1 or more"):
        nk.calibrate_(layer, [torch.randn(2, 2)], steps=0)
    with pytest.raises(TypeError, match=r"calibrate_: list is not a torch\.nn\.Module"):
        nk.calibrate_([layer], [])
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as caught:
        nk.calibrate_(layer, [torch.randn(4, 2), torch.randn(1, 2)])
    assert "this was batch 2" in caught.value.__notes__[0]
    assert "drop_last=True" in caught.value.__notes__[0]
    with pytest.raises(ValueError, match="4D") as caught:
        nk.calibrate_(layer, [torch.randn(4, 2, 3, 3)])
    assert caught.value.__notes__ == ["calibrate_: this was batch 1; nothing was changed"]
    nothing = nk.calibrate_(nn.Linear(2, 2), [torch.randn(4, 2)])
    assert nothing.notes == ("there is no layer whose running statistics could be re-estimated",)


# Which layers.


@each_library
def test_a_layer_that_is_called_twice_counts_both_calls(library):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = library.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x[:5]).sum() + self.norm(x[5:] * 2).sum()

    model, x = Twice(), torch.randn(8, 2)
    nk.calibrate_(model, [x])
    everything = torch.cat([x[:5], x[5:] * 2])
    torch.testing.assert_close(model.norm.running_mean, everything.mean(0))
    torch.testing.assert_close(model.norm.running_var, everything.var(0))
    assert model.norm.num_batches_tracked == 2


class Odd(nn.Module):
    """Has a running mean and is no norm that anybody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.running_mean


def test_what_is_left_alone_is_named_with_its_reason():
    frozen, lazy = nk.BatchNorm1d(2), nn.LazyBatchNorm1d()
    nk.freeze_(frozen)
    unused = nn.BatchNorm1d(2)
    chain = nn.Sequential(
        frozen, nn.BatchNorm1d(2, track_running_stats=False), Odd(), nn.BatchNorm1d(2), nk.BatchNorm1d(2)
    )
    model = nn.ModuleDict({"chain": chain, "unused": unused, "lazy": lazy})
    certificate = nk.calibrate_(
        model,
        [torch.randn(4, 2)],
        call=lambda m, x: m["chain"](x),
        filter_fn=lambda module, name: name != "chain.4",
    )
    reasons = {row.module: row.reason for row in certificate.skipped}
    assert reasons.pop("chain.2").endswith("Odd is no batch or instance norm of torch's")
    assert reasons == {
        "chain.0": "it is frozen",
        "chain.4": "filter_fn left it out",
        "unused": "no batch came by",
        "lazy": "its size is not known yet; run one batch through the model first",
    }
    assert [row.module for row in certificate.changed] == ["chain.3"]


def test_a_model_in_evaluation_mode_is_calibrated_as_a_whole():
    model = network().eval()
    assert len(nk.calibrate_(model, batches(4, 4)).changed) == 2
    assert not any(module.training for module in model.modules())


def test_a_context_that_holds_statistics_holds_them_here_too():
    layer = nk.BatchNorm1d(2)
    with nk.statistics_frozen(layer):
        assert nk.calibrate_(layer, [torch.randn(4, 2)]).skipped[0].reason == "it is frozen"
    with nk.accumulate_statistics(layer), pytest.raises(RuntimeError, match="its statistics wait for an optimizer"):
        nk.calibrate_(layer, [torch.randn(4, 2)])
    assert layer.hold.pending is None


@each_library
def test_a_batch_that_is_not_finite_is_left_out(library):
    layer, good = library.BatchNorm1d(2), torch.randn(6, 2) + 5
    nk.calibrate_(layer, [good, torch.full((4, 2), torch.nan)])
    torch.testing.assert_close(layer.running_mean, good.mean(0))
    torch.testing.assert_close(layer.running_var, good.var(0))
    again = nk.calibrate_(layer, [torch.full((4, 2), torch.inf)])
    assert again.skipped[0].reason == "no batch was finite there"
    torch.testing.assert_close(layer.running_mean, good.mean(0))


def test_an_instance_norm_without_batch_axis_is_one_sample():
    layer, x = nn.InstanceNorm1d(3, track_running_stats=True), torch.randn(3, 9) + 4
    nk.calibrate_(layer, [x], call=lambda m, b: m(b))
    torch.testing.assert_close(layer.running_mean, x.mean(1))
    torch.testing.assert_close(layer.running_var, x.var(1))


def test_masked_values_count_nothing():
    layer, x = nk.BatchNorm1d(2), torch.randn(4, 2, 6)
    lengths = torch.tensor([6, 1, 3, 2])
    nk.calibrate_(layer, [x], call=lambda m, b: m(b, lengths=lengths))
    kept = torch.cat([sample[:, :n] for sample, n in zip(x, lengths, strict=True)], 1)
    torch.testing.assert_close(layer.running_mean, kept.mean(1))
    torch.testing.assert_close(layer.running_var, kept.var(1))


# Policies keep what they keep.


def test_every_domain_gets_its_own():
    layer = nk.BatchNorm1d(1, statistics=nk.statistics.PerDomain(3))
    data = [(torch.randn(n, 1) + 10 * domain, domain) for n, domain in ((6, 0), (3, 2), (5, 0))]

    def call(model: nn.Module, batch: tuple[Tensor, int]) -> None:
        with nk.domain(batch[1]):
            model(batch[0])

    nk.calibrate_(layer, data, call=call)
    of = lambda *chosen: torch.cat([x for x, domain in data if domain in chosen])
    rows = layer.statistics_state
    torch.testing.assert_close(rows.mean[0], of(0).mean(0))
    torch.testing.assert_close(rows.var[2], of(2).var(0))
    torch.testing.assert_close(layer.running_mean, of(0, 2).mean(0))
    assert rows.batches.tolist() == [2, 0, 1]
    assert rows.mean[1].item() == 0


@pytest.mark.parametrize("policy", [nk.statistics.Renorm(), nk.statistics.Running(), nk.statistics.Ghost(4)], ids=repr)
def test_stale_statistics_do_not_reach_the_layers_behind(policy):
    data = batches(8, 8)
    plain, model = network(nk), network(nk)
    for layer in (model[1], model[5]):
        layer._set_policy(policy)
        layer.running_mean.fill_(50)
    model.load_state_dict({**plain.state_dict(), "1.running_mean": torch.full((6,), 50.0)})
    nk.calibrate_(plain, data)
    certificate = nk.calibrate_(model, data)
    assert model[1].statistics is policy
    torch.testing.assert_close(model[1].running_mean, plain[1].running_mean, **TIGHT)
    if not isinstance(policy, nk.statistics.Ghost):  # which normalises by smaller batches
        torch.testing.assert_close(model[5].running_var, plain[5].running_var, **TIGHT)
    assert {p.safety for p in certificate.changed} == (
        {"train_identical"} if isinstance(policy, nk.statistics.Ghost) else {"retrain"}
    )


def test_an_average_over_all_batches_goes_on_from_there():
    layer = nk.BatchNorm1d(1, momentum=None)
    first, second = torch.randn(6, 1), torch.randn(2, 1) + 9
    nk.calibrate_(layer, [first])
    layer(second)
    torch.testing.assert_close(layer.running_mean, torch.cat([first, second]).mean(0))


# What stays.


@each_library
def test_buffers_change_in_place_and_undo_is_exact(library):
    model = network(library)
    model[3].eval()
    modes = [module.training for module in model.modules()]
    buffers = dict(model.named_buffers())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    certificate = nk.calibrate_(model, batches(4, 4))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(dict(model.named_buffers())[name] is buffer for name, buffer in buffers.items())
    assert [module.training for module in model.modules()] == modes
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    certificate.undo()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_undo_refuses_once_the_statistics_have_moved():
    model = network()
    certificate = nk.calibrate_(model, batches(4, 4))
    model(batches(4)[0])
    with pytest.raises(RuntimeError, match="1: its statistics have moved since"):
        certificate.undo()


def test_twice_is_once_and_a_dry_run_changes_nothing():
    model, data = network(), batches(4, 6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    planned = nk.plan(nk.calibrate_, model, data)
    assert planned.verdict == "calibrate_ (planned): 2 x statistics calibrated."
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="nothing to take back"):
        planned.undo()
    nk.calibrate_(model, data)
    again = nk.calibrate_(model, data)
    assert again.changed == ()
    assert {row.reason for row in again.skipped} == {"its statistics are those of these batches already"}


def test_gradients_and_hooks_are_left_alone():
    model, seen = network(), []
    model[1].register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    nk.calibrate_(model, batches(4))
    assert set(seen) == {False}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(model[1]._forward_hooks) == 1
    assert not model[1]._forward_pre_hooks


# keep_if, progress, drift.


@pytest.mark.parametrize(("scores", "kept"), [((0.9, 0.8), "old"), ((0.8, 0.9), "new"), ((0.9, 0.9), "new")])
def test_the_better_statistics_stay(scores, kept):
    model, given, modes = network(), iter(scores), []

    def metric(m: nn.Module) -> float:
        modes.append(m.training or m[1].training)
        return next(given)

    before = model[1].running_mean.clone()
    certificate = nk.calibrate_(model, batches(4, 4), keep_if=metric)
    assert torch.equal(model[1].running_mean, before) == (kept == "old")
    assert modes == [False, False]
    assert f"the {kept} statistics stay" in certificate.notes[-1]
    values = [reading.value for reading in certificate.readings if reading.quantity.startswith("keep_if")]
    assert values == list(scores)


def test_a_metric_that_is_not_a_number():
    model = network()
    nan = float("nan")
    for scores, changed in (((0.5, nan), 0), ((nan, 0.5), 2), ((nan, nan), 2)):
        given = iter(scores)
        certificate = nk.plan(nk.calibrate_, model, batches(4, 4), keep_if=lambda m, given=given: next(given))
        assert len(certificate.changed) == changed, scores


def test_the_metric_sees_the_statistics_that_it_judges():
    model, data, seen = network(), batches(4, 4), []
    nk.calibrate_(model, data, keep_if=lambda m: seen.append(m[1].running_mean.clone()) or 0.0)
    assert seen[0].abs().max() == 0
    torch.testing.assert_close(seen[1], model[1].running_mean)


def test_progress_is_told():
    told = []
    nk.calibrate_(nn.BatchNorm1d(2), [torch.randn(4, 2)] * 5, steps=3, progress=lambda *now: told.append(now))
    assert told == [(1, 3), (2, 3), (3, 3)]
    told.clear()
    nk.calibrate_(nn.BatchNorm1d(2), iter([torch.randn(4, 2)]), steps=None, progress=lambda *now: told.append(now))
    assert told == [(1, None)]

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(torch.randn(4, 2))

    told.clear()
    nk.calibrate_(
        nn.BatchNorm1d(2), torch.utils.data.DataLoader(Stream(), batch_size=4), progress=lambda *now: told.append(now)
    )
    assert told == [(1, 200)]


def test_the_drift_is_in_standard_deviations():
    layer = nn.BatchNorm1d(1, eps=1e-12)
    x = torch.tensor([[-1.0], [1.0]]) * 3 + 4  # mean 4, deviation 3, where mean 0 and deviation 1 are assumed
    certificate = nk.calibrate_(layer, [x])
    drift = {reading.quantity: reading for reading in certificate.readings}
    assert drift["drift before"].value == pytest.approx((4**2 + 2**2) ** 0.5)
    assert drift["drift after"].value == pytest.approx(1 - 0.5**0.5)  # two values: biased against unbiased
    assert drift["drift before"].unit == "standard deviations"
    assert "drift 4.5 before, 0.29 after" in repr(certificate)


def test_drift_is_measured_on_batches_from_all_over_the_data():
    from normkit.surgery.batches import Feed

    feed = Feed(range(1000), None, lambda model, batch: None, None)
    assert list(feed) == list(range(1000))
    assert len(feed.held) <= 8
    assert feed.held[0] == 0
    assert feed.held[-1] >= 750


# Wrappers.


def test_compiled_models_are_calibrated_as_they_are_written():
    model, plain, data = network(), network(), batches(4, 6)
    nk.calibrate_(plain, data)
    compiled = torch.compile(model, backend="eager")
    nk.calibrate_(compiled, data)
    torch.testing.assert_close(model[5].running_var, plain[5].running_var)
    inside = network()
    inside[0].compile(backend="eager")
    nk.calibrate_(inside, data)
    torch.testing.assert_close(inside[5].running_var, plain[5].running_var)


def test_a_scripted_model_is_refused_with_a_sentence():
    class Scripted(torch.jit.ScriptModule):
        pass

    with pytest.raises(TypeError, match=r"0 is a TorchScript module, whose code is fixed; nothing was changed"):
        nk.calibrate_(nn.Sequential(Scripted()), [torch.randn(2, 2)])


# Processes.


def shares() -> list[list[Tensor]]:
    """What each of three processes has: much, little, nothing."""
    data = batches(5, 3, 4, 7)
    return [data[:3], data[3:], []]


def pooled_by_three(rank: int, ours: bool) -> None:
    library = nk if ours else nn
    share = shares()[rank]
    alone, model = network(library), network(library)
    instance = library.InstanceNorm2d(3, track_running_stats=True)
    calls = []
    certificate = nk.calibrate_(model, share, keep_if=lambda m: calls.append(0) or float(rank * len(calls)))
    nk.calibrate_(instance, share)
    everything = [x for share in shares() for x in share]
    mean, var = by_hand(alone, everything, 5)
    torch.testing.assert_close(model[5].running_mean.double(), mean, **TIGHT)
    torch.testing.assert_close(model[5].running_var.double(), var, **TIGHT)
    assert model[5].num_batches_tracked == 4
    assert certificate.notes[0].startswith("statistics of 4 batches")
    assert [r.value for r in certificate.readings if r.quantity.startswith("keep_if")] == [1.0, 2.0]
    samples = torch.cat(everything).double()
    torch.testing.assert_close(instance.running_mean.double(), samples.mean((2, 3)).mean(0), **TIGHT)
    torch.testing.assert_close(instance.running_var.double(), samples.var((2, 3)).mean(0), **TIGHT)
    wrapped = DistributedDataParallel(network(library))
    nk.calibrate_(wrapped, share)
    torch.testing.assert_close(wrapped.module[5].running_var.double(), var, **TIGHT)
    if rank < 2:  # in a group of their own
        group = dist.new_group([0, 1], use_local_synchronization=True)
        nk.calibrate_(model, [x * 2 for x in share], process_group=group)
        torch.testing.assert_close(
            model[1].running_mean.double(), by_hand(alone, [x * 2 for x in everything], 1)[0], **TIGHT
        )


@pytest.mark.slow
@pytest.mark.parametrize("ours", [False, True])
def test_processes_pool_what_each_has(ours, tmp_path):
    spawn(3, tmp_path, pooled_by_three, ours)


def synchronised(rank: int) -> None:
    data = batches(6, 4)
    model = nk.BatchNorm2d(3, statistics=nk.statistics.Synchronized())
    nk.calibrate_(model, [x[rank::2] for x in data])
    everything = torch.cat(data).double()
    torch.testing.assert_close(model.running_mean.double(), everything.mean((0, 2, 3)), **TIGHT)
    torch.testing.assert_close(model.running_var.double(), everything.var((0, 2, 3)), **TIGHT)
    other = nn.Sequential(*[nk.BatchNorm1d(2) for _ in range(1 + rank)])
    with pytest.raises(RuntimeError, match="calibrate_: the processes have different layers; nothing was changed"):
        nk.calibrate_(other, [torch.randn(4, 2)])


@pytest.mark.slow
def test_what_processes_have_measured_together_counts_once(tmp_path):
    spawn(2, tmp_path, synchronised)
