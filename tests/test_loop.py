"""nk.strategies.attach: strategies act in a training loop, and what they do is written down."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
import torch.distributed as dist
from tests.processes import spawn
from torch import nn
from torch.nn import functional as F

import normkit as nk
from normkit import strategies
from normkit.strategies import Coupling, Freeze, Handover, Recalibrate, Select, attach

TEXTS = (
    "batch -> frozen@30% lr/10",
    "batch -> group:4@50%",
    "batch -> layer@20% -> batch@60%",
    "batch -> none@50% rewarm:3",
    "taper@20-60%",
    "renorm@10-40%",
    "ghost:2-8@0-80%",
    "batch -> frozen@30% -> folded@50%",
    "frozen@40% clip:0.05 -> batch@70%",
)
STEPS = 20


def network(norm=lambda: nn.BatchNorm2d(8)) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        norm(),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        norm(),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


def batches(count=STEPS, size=16):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(size, 3, 6, 6, generator=generator) * 2 + 1
        yield x, x.mean((2, 3)).argmax(1)


def take(model, optimizer, batch):
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def train(model, optimizer, data, attached=None):
    for batch in data:
        take(model, optimizer, batch)
    return model


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


@pytest.mark.parametrize("text", [*TEXTS[:2], *(pytest.param(text, marks=pytest.mark.slow) for text in TEXTS[2:])])
def test_a_run_that_was_killed_goes_on_as_if_nothing_had_happened(text, tmp_path):
    """The state goes through a file that holds tensors and plain data only."""
    data = list(batches())
    whole = network()
    optimizer = sgd(whole)
    with attach(whole, optimizer, text, total_steps=STEPS) as attached:
        train(whole, optimizer, data)
    assert attached.record
    assert not any("failed" in line for line in attached.record)
    for cut in (3, 9, 15):
        first = network()
        optimizer = sgd(first)
        with attach(first, optimizer, text, total_steps=STEPS) as before:
            train(first, optimizer, data[:cut])
            torch.save(
                {"model": first.state_dict(), "optimizer": optimizer.state_dict(), "strategy": before.state_dict()},
                tmp_path / "checkpoint.pt",
            )
        saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        second = network()
        optimizer = sgd(second)
        with attach(second, optimizer, text, total_steps=STEPS) as after:
            after.load_state_dict(saved["strategy"])
            second.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            train(second, optimizer, data[cut:])
        assert repr(second) == repr(whole)
        for name, tensor in whole.state_dict().items():
            assert torch.equal(tensor, second.state_dict()[name]), name
        assert after.record == attached.record


def test_a_frozen_network_does_what_evaluation_did_and_the_jump_is_in_the_record():
    model = network()
    optimizer = sgd(model)
    data = list(batches())
    seen = []
    with attach(model, optimizer, Freeze(10, coupling=Coupling(divide=10)), out=seen.append) as attached:
        train(model, optimizer, data[:9])
        optimizer.zero_grad()
        F.cross_entropy(model(data[9][0]), data[9][1]).backward()
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005)
        (line,) = attached.record
        model.train()
        x = data[9][0]
        training, evaluation = model(x), copy.deepcopy(model).eval()(x)
        torch.testing.assert_close(training, evaluation)
    assert seen == attached.record
    assert line["step"] == 10
    assert line["coupling"] == "lr/10"
    assert line["changed"] == 4  # two become normkit's, two are frozen
    assert line["moved_in_evaluation"] < 1e-5
    assert 1e-3 < line["moved_in_training"] < 1


def test_a_handover_moves_the_outputs_less_than_one_without_a_fit():
    model = network()
    optimizer = sgd(model)
    data = list(batches(12))
    with attach(model, optimizer, Handover(12, "group:4")) as attached:
        train(model, optimizer, data[:11])
        unfitted = copy.deepcopy(model)
        take(model, optimizer, data[11])
    plain = copy.deepcopy(unfitted).eval()(data[11][0]).detach()
    nk.convert_(unfitted, to="group:4")
    without = float(((unfitted.eval()(data[11][0]).detach() - plain).square().mean()).sqrt() / plain.std().detach())
    assert isinstance(model[1], nk.GroupNorm)
    assert attached.record[0]["moved_in_evaluation"] < 0.8 * without


def test_nothing_is_left_behind():
    model = network()
    optimizer = sgd(model)
    attached = attach(model, optimizer, Freeze(1000))
    twin = network()
    other = sgd(twin)
    data = list(batches(5))
    train(model, optimizer, data)
    train(twin, other, data)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    copy.deepcopy(model)(torch.zeros(7, 3, 6, 6))
    assert len(attached.batch[0][0]) == 16  # a copy of the model is not watched
    attached.close()
    assert not model._forward_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert attached.batch is None


def test_a_switch_that_fails_leaves_the_model_and_says_so(caplog, tmp_path):
    model = network()
    optimizer = sgd(model)
    strategy = Handover(2, "group:4", modules=("1",))
    with (
        attach(model, optimizer, strategy, out=tmp_path / "runs" / "switches.jsonl") as attached,
        caplog.at_level(logging.WARNING),
    ):
        nn.utils.parametrizations.weight_norm(model[0])
        model[1].forward = model[1].forward  # replaced on the object: surgery refuses it
        attached._given = lambda: {"match": "nonsense"}
        train(model, optimizer, batches(4))
    assert type(model[1]) is nn.BatchNorm2d
    (line,) = attached.record
    assert "failed" in line
    assert "the model is as it was" in caplog.text
    assert json.loads((tmp_path / "runs" / "switches.jsonl").read_text()) == line
    assert not attached.carried


def test_a_scheduler_goes_on_from_the_new_rate():
    model = network()
    optimizer = sgd(model)
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 40),
    ]
    with attach(model, optimizer, Freeze(5, coupling=Coupling(divide=10)), scheduler=schedulers[0]):
        for batch in batches(10):
            take(model, optimizer, batch)
            schedulers[0].step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005 * (1 - 10 / 40))
    with pytest.raises(ValueError, match="scheduler=scheduler"):
        attach(model, optimizer, Freeze(5, coupling=Coupling(divide=10)))
    attach(model, optimizer, Freeze(5)).close()


def test_a_warm_up_comes_up_again():
    model = network()
    optimizer = sgd(model, lr=1e-3)
    rates = []
    with attach(model, optimizer, Freeze(2, coupling=Coupling(rewarm=4))):
        for batch in batches(8):
            rates.append(optimizer.param_groups[0]["lr"])
            take(model, optimizer, batch)
    assert rates == pytest.approx([1e-3 * share for share in (1, 1, 0.2, 0.4, 0.6, 0.8, 1, 1)])


def test_measurements_decide():
    model = network()
    optimizer = sgd(model, lr=1e-4)
    with attach(model, optimizer, "frozen@mean_drift<0.5", every=2) as attached:
        train(model, optimizer, batches(60))
    (line,) = attached.record
    drifts = [r for r in attached.readings.kept if r.quantity == "mean_drift"]
    at = [max(r.value for r in drifts if r.step == step) for step in range(2, line["step"] + 1, 2)]
    assert [value < 0.5 for value in at[-3:]] == [True] * 3
    assert not any(all(v < 0.5 for v in at[k : k + 3]) for k in range(len(at) - 3))


def test_the_loss_and_the_noise_of_the_gradient_are_read():
    model = network()
    optimizer = sgd(model, lr=0.0)
    x, y = next(iter(batches(1)))
    both = [Freeze("plateau:5", modules=("1",)), Freeze("gradient_noise<1e-9", modules=("4",))]
    with attach(model, optimizer, both, every=3) as attached:
        for _ in range(12):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            attached.log(loss)
            optimizer.step()
    assert attached.record[0]["step"] == 9  # the same batch again and again has no noise: three times, every 3 steps
    noise = [r.value for r in attached.readings.kept if r.quantity == "gradient_noise"]
    assert noise[0] < 1e-9
    assert attached.record[1]["step"] == 10  # and its loss stands still


def test_what_is_so_already_is_no_switch_but_the_step_size_is_cut():
    """The control of every switch that cuts it: the same cut, and the norms as they are."""
    model = network(lambda: nk.BatchNorm2d(8))
    optimizer = sgd(model)
    with attach(model, optimizer, "batch -> batch@3 lr/10") as attached:
        train(model, optimizer, batches(4))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005)
    (line,) = attached.record
    assert (line["step"], line["changed"], line["coupling"]) == (3, 0, "lr/10")


def test_switchable_norms_settle():
    model = network(lambda: nk.SwitchableNorm(8))
    optimizer = sgd(model)
    with torch.no_grad():
        for logits in (model[1].mean_logits, model[1].var_logits):
            logits.copy_(torch.tensor([0.0, 0.0, 9.0]))  # batch
    with attach(model, optimizer, Select(8), every=2) as attached:
        train(model, optimizer, batches(10))
    assert isinstance(model[1], nk.BatchNorm2d)
    assert not isinstance(model[4], nk.SwitchableNorm)
    assert [line["step"] for line in attached.record] == [2, 8]


def test_recalibration_needs_data_and_uses_it():
    model = network()
    optimizer = sgd(model)
    with pytest.raises(ValueError, match="give loader="):
        attach(model, optimizer, Recalibrate(5))
    loader = list(batches(3))
    with attach(model, optimizer, Recalibrate(5), loader=loader):
        train(model, optimizer, batches(5))
    expected = model[0](torch.cat([x for x, _ in loader])).mean((0, 2, 3))
    torch.testing.assert_close(model[1].running_mean, expected, rtol=1e-3, atol=1e-4)


def test_what_is_missing_is_named_before_training():
    model = network()
    optimizer = sgd(model)
    with pytest.raises(ValueError, match="total_steps="):
        attach(model, optimizer, "frozen@50%")
    with pytest.raises(ValueError, match="steps_per_epoch="):
        attach(model, optimizer, "frozen@2ep")
    with pytest.raises(ValueError, match="ends at step 10, and starts at 20"):
        attach(model, optimizer, "batch -> taper@20-10%", total_steps=100)
    with pytest.raises(ValueError, match="every=0"):
        attach(model, optimizer, Freeze(3), every=0)
    attached = attach(model, optimizer, Freeze(3))
    with pytest.raises(ValueError, match="the checkpoint has 2 strategies, and 1 are attached"):
        attached.load_state_dict({"states": [{}, {}]})
    attached.close()
    assert not model._forward_pre_hooks


def test_micro_batches_make_one_step():
    model = network()
    optimizer = sgd(model)
    with attach(model, optimizer, Freeze(2)) as attached:
        for number, (x, y) in enumerate(batches(8), 1):
            F.cross_entropy(model(x), y).backward()
            if number % 4 == 0:
                optimizer.step()
                optimizer.zero_grad()
    assert attached.moment.step == 2
    assert model[1].frozen


def _together(rank: int, text: str) -> None:
    model = network()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = sgd(wrapped)
    with attach(wrapped, optimizer, text, total_steps=10, every=2) as attached:
        for x, y in batches(10):
            take(wrapped, optimizer, (x[rank::2], y[rank::2]))
    assert attached.record
    assert not any("failed" in line for line in attached.record)
    for name, tensor in (*model.named_parameters(), *optimizer_state(optimizer)):
        others = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(others, tensor.detach())
        assert torch.equal(*others), name
    assert [line["step"] for line in attached.record] == steps_of(attached.record)


def steps_of(record) -> list[int]:
    """Of the first process."""
    steps = torch.tensor([line["step"] for line in record])
    dist.broadcast(steps, 0)
    return steps.tolist()


def optimizer_state(optimizer):
    for place, state in enumerate(optimizer.state.values()):
        yield f"state {place}", state["momentum_buffer"]


@pytest.mark.parametrize(
    "text",
    [
        "batch -> group:4@50%",
        *(
            pytest.param(t, marks=pytest.mark.slow)
            for t in ("batch -> frozen@30%", "frozen@mean_drift<5", "taper@20-60%")
        ),
    ],
)
def test_two_processes_stay_one_model(text, tmp_path):
    spawn(2, tmp_path, _together, text)


@pytest.mark.slow
def test_a_compiled_model_is_switched_too():
    model = network()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = sgd(model)
    plain = network()
    other = sgd(plain)
    text = "batch -> frozen@30% -> group:4@60%"
    with attach(compiled, optimizer, text, total_steps=10), attach(plain, other, text, total_steps=10):
        for batch in batches(10):
            take(compiled, optimizer, batch)
            take(plain, other, batch)
    assert isinstance(model[1], nk.GroupNorm)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
def test_training_goes_on_behind_a_switch(text):
    """The real thing, small: with the step size cut, a network still learns after its norms have changed."""
    model = network()
    optimizer = sgd(model, lr=0.02)
    data = list(batches(200, size=32))
    with attach(model, optimizer, text, total_steps=200):
        train(model, optimizer, data)
    x, y = next(iter(batches(1, size=400)))
    assert (model.eval()(x).argmax(1) == y).float().mean() > 0.6


def test_the_menu_offers_it():
    assert strategies.attach is attach
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        _ = strategies.atach
