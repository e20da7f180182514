"""From layer norm to a batch norm that folds away, while a model trains: the operations, the strategy, the arm."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.distributed as dist
from tests.processes import spawn
from torch import nn
from torch.nn import functional as F

import normkit as nk
from normkit.blocks import ProgressiveRepBatchNorm, RepBatchNorm
from normkit.lab import Experiment
from normkit.lab.arm import parse_arm
from normkit.report import strategies
from normkit.strategies import Moment, Progressive, attach, parse
from normkit.vocabulary.evidence import Evidence
from test_lab_train import cell, lines, run

WHOLE = "layer -> progressive@10%-50% -> frozen@70% lr/10 -> folded@80%"
STEPS = 20


def network(first=nn.LayerNorm, second=nk.RMSNorm) -> nn.Module:
    """Tokens (n, t, 4) in, (n, t, 3) out; every norm has a linear layer behind it."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), first(8), nn.Linear(8, 8), nn.ReLU(), second(8), nn.Linear(8, 3))


def learnt(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def batches(count=STEPS, size=8, start=1):
    generator = torch.Generator().manual_seed(start)
    for _ in range(count):
        x = 2 * torch.randn(size, 5, 4, generator=generator) + 1
        yield x, x.cumsum(1)[..., :3].argmax(-1)


def loss(model, x, y):
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def train(model, optimizer, data):
    for x, y in data:
        optimizer.zero_grad()
        loss(model, x, y).backward()
        optimizer.step()


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def held(optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def same(ones, others) -> bool:
    """Whether they are the same objects."""
    return [id(one) for one in ones] == [id(other) for other in others]


@pytest.mark.parametrize("shape", [(6, 5, 8), (30, 8), (2, 3, 5, 8)])
def test_every_token_is_a_row(shape):
    x, mask = torch.randn(shape) * 2 + 1, torch.rand(shape[:-1]) > 0.3
    for norm in (RepBatchNorm(8), ProgressiveRepBatchNorm(8, steps=3, warmup=1)):
        for _ in range(3):
            rows = copy.deepcopy(norm)
            assert norm(x).equal(rows(x.flatten(0, -2)).view(shape))
            masked = norm(x, mask=mask)
            assert masked.equal(rows(x.flatten(0, -2), mask=mask.flatten()).view(shape))
            assert not masked[~mask].any()


def test_at_the_start_nothing_moves_and_the_optimizer_goes_on_with_the_same_parameters():
    model = learnt(network())
    optimizer = adam(model)
    train(model, optimizer, batches(3))
    weights, state = [model[1].weight, model[1].bias, model[4].weight], copy.deepcopy(optimizer.state_dict()["state"])
    x = next(batches(1))[0]
    outputs = [copy.deepcopy(model).train(mode)(x) for mode in (True, False)]
    certificate = nk.progressive_(model, steps=4, optimizer=optimizer, example_inputs=x)
    assert certificate.verdict.startswith("progressive_: 1 x LayerNorm becomes ProgressiveRepBatchNorm")
    for mode, before in zip((True, False), outputs, strict=True):
        torch.testing.assert_close(copy.deepcopy(model).train(mode)(x), before, rtol=0, atol=1e-6)
    assert same([model[1].layer.weight, model[1].layer.bias, model[4].layer.weight], weights)
    assert all(torch.equal(p, w) for p, w in zip(model[1].rep.norm.parameters(), weights[:2], strict=True))
    assert held(optimizer) == {id(p) for p in model.parameters()}
    assert all(
        torch.equal(optimizer.state[w]["exp_avg"], state[k]["exp_avg"]) for w, k in zip(weights, (2, 3, 6), strict=True)
    )
    certificate.undo()
    assert repr(model) == repr(network())
    assert same([model[1].weight, model[1].bias, model[4].weight], weights)
    assert held(optimizer) == {id(p) for p in model.parameters()}


def test_at_the_end_the_layer_norm_leaves_model_and_optimizer():
    model = network()
    optimizer = adam(model)
    nk.progressive_(model, steps=3, optimizer=optimizer)
    train(model, optimizer, batches(2))
    early = nk.settle_(model, optimizer=optimizer)
    assert not early.changed
    assert "still has a share of 0.333; train on first" in early.refused[0].reason
    train(model, optimizer, batches(1))
    kept = {id(p): optimizer.state[p]["exp_avg"].clone() for p in model[1].rep.parameters()}
    x = next(batches(1))[0]
    certificate = nk.settle_(model, optimizer=optimizer, example_inputs=x)
    assert {len(certificate.changed), type(model[1]), type(model[4])} == {3, RepBatchNorm}
    assert not any(isinstance(part, nn.LayerNorm | nn.RMSNorm) for part in model.modules())
    assert held(optimizer) == {id(p) for p in model.parameters()}
    assert kept.keys() == {id(p) for p in model[1].parameters()}
    assert all(torch.equal(optimizer.state[p]["exp_avg"], kept[id(p)]) for p in model[1].parameters())
    nk.freeze_(model, affine=False)
    wanted = model(x)
    nk.fold_(model, x, optimizer=optimizer)
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    assert held(optimizer) == {id(p) for p in model.parameters()}
    assert len(held(optimizer)) == 6


def test_settling_early_loses_what_is_left_and_is_taken_back():
    model = network()
    nk.progressive_(model, steps=2)
    model(next(batches(1))[0])
    before, text = model.state_dict(), repr(model)
    certificate = nk.settle_(model, early=True)
    assert type(model[1]) is RepBatchNorm
    certificate.undo()
    assert repr(model) == text
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_what_stays_and_why():
    model = nn.ModuleDict(
        {
            "pixels": nn.LayerNorm((3, 8)),
            "first": nk.LayerNorm(8, channels_first=True),
            "active": nk.LayerNorm(8, activation="silu"),
            "torchs": nn.TransformerEncoderLayer(8, 2, 8),
            "ours": nk.TransformerEncoderLayer(8, 2, 8),
            "way": ProgressiveRepBatchNorm(8, steps=2),
            "batch": nn.BatchNorm1d(8),
        }
    )
    plan = nk.plan(nk.progressive_, model, steps=3, filter_fn=lambda module, name: name != "ours.norm2")
    assert [p.module for p in plan.changed] == ["ours.norm1"]
    assert {row.module: row.reason for row in plan.skipped} == {
        "way": "it is on its way already",
        "ours.norm2": "filter_fn left it out",
    }
    reasons = {row.module: row.reason for row in plan.refused}
    assert "normalises 2 axes" in reasons["pixels"]
    assert "channels are on axis 1" in reasons["first"]
    assert "activates by" in reasons["active"]
    assert "computes a layer norm itself" in reasons["torchs.norm1"]
    with pytest.raises(ValueError, match="steps=0"):
        nk.progressive_(network(), steps=0)


def test_weights_that_are_tied_to_another_layer_stay_in_the_optimizer():
    model = network(second=nn.LayerNorm)
    model[4].weight = model[1].weight
    optimizer = adam(model)
    nk.progressive_(model, steps=1, optimizer=optimizer, filter_fn=lambda module, name: name == "1")
    train(model, optimizer, batches(1))
    nk.settle_(model, optimizer=optimizer)
    assert held(optimizer) == {id(p) for p in model.parameters()}
    assert id(model[4].weight) in held(optimizer)


def replay(strategy, total=100):
    """The state survives a file at every step."""
    state, found = strategy.init(network()), []
    for step in range(1, total + 1):
        state = json.loads(json.dumps(state))
        found += [
            (step, p.operation, dict(p.options)) for p in strategy.update(state, Moment(step, total), Evidence([]))
        ]
    return found


def test_the_strategy_begins_with_as_many_batches_as_steps_are_left_and_ends_on_time():
    assert replay(Progressive(start="10%", end="60%")) == [
        (10, "progressive_", {"steps": 50}),
        (60, "settle_", {"early": True}),
    ]
    assert replay(parse("progressive@0%-60%"))[0] == (1, "progressive_", {"steps": 59})
    assert [step for step, *_ in replay(parse("frozen@50% -> progressive@10-20%"))] == [50, 51, 52]
    named = Progressive(start=0, end=5, modules=("1",)).update({"done": False, "at": -1}, Moment(1), Evidence([]))
    assert [p.module for p in named] == ["1"]


def test_the_text():
    assert str(parse(WHOLE)) == "progressive@10%-50% -> frozen@70% lr/10 -> folded@80%"
    assert parse(str(parse(WHOLE))) == parse(WHOLE)
    assert len(parse("progressive:200 -> frozen@70%").phases) == 1  # a norm with a schedule of its own
    with pytest.raises(ValueError, match="a ramp runs between two points; write progressive@20%-60%"):
        parse("progressive@20%")
    with pytest.raises(ValueError, match="the way is as long as the ramp; write progressive@0%-60%"):
        parse("layer -> progressive:200@0%-60%")
    assert (parse_arm("progressive@0%-60%").norm, parse_arm("rms->progressive@0%-60%").norm) == ("layer", "rms")


def test_a_whole_run_and_the_jump_at_every_switch():
    model = network()
    optimizer = adam(model)
    with attach(model, optimizer, WHOLE, total_steps=STEPS) as attached:
        train(model, optimizer, batches())
    assert [(line["step"], line["action"], line["changed"]) for line in attached.record] == [
        (2, "on the way to RepBN", 3),
        (10, "layer norm taken out", 3),
        (14, "frozen", 2),
        (16, "norms folded", 3),
    ]
    assert max(line["moved_in_evaluation"] for line in attached.record) < 1e-5
    assert [line["moved_in_training"] < 1e-5 for line in attached.record] == [True, True, False, True]
    assert len(held(optimizer)) == 6  # three linear layers
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm | nn.LayerNorm) for part in model.modules())


def test_a_model_without_layer_norms_is_told_so():
    model = network(nn.Identity, nn.Identity)
    with attach(model, adam(model), "progressive@0%-60%", total_steps=4) as attached:
        train(model, attached.optimizer, batches(1))
    assert attached.record[0]["failed"].startswith("nothing was changed")


@pytest.mark.parametrize("text", ["progressive@10%-50%", pytest.param(WHOLE, marks=pytest.mark.slow)])
def test_a_run_that_was_killed_goes_on_as_if_nothing_had_happened(text, tmp_path):
    data = list(batches())
    whole = network()
    optimizer = adam(whole)
    with attach(whole, optimizer, text, total_steps=STEPS) as attached:
        train(whole, optimizer, data)
    for cut in (1, 5, 12, 15, 18):
        first = network()
        optimizer = adam(first)
        with attach(first, optimizer, text, total_steps=STEPS) as before:
            train(first, optimizer, data[:cut])
            torch.save([first.state_dict(), optimizer.state_dict(), before.state_dict()], tmp_path / "checkpoint.pt")
        saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        second = network()
        optimizer = adam(second)
        with attach(second, optimizer, text, total_steps=STEPS) as after:
            after.load_state_dict(saved[2])
            second.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
            train(second, optimizer, data[cut:])
        assert repr(second) == repr(whole)
        assert all(torch.equal(value, second.state_dict()[name]) for name, value in whole.state_dict().items())
        assert after.record == attached.record


def _averaging(rank: int) -> None:
    """Two processes that average their gradients themselves, each with half of every batch."""
    model = network()
    optimizer = adam(model)
    with attach(model, optimizer, WHOLE, total_steps=STEPS) as attached:
        for x, y in batches():
            optimizer.zero_grad()
            loss(model, x[rank::2], y[rank::2]).backward()
            for parameter in model.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
            optimizer.step()
    assert [line["step"] for line in attached.record if "failed" not in line] == [2, 10, 14, 16]
    for name, tensor in model.named_parameters():
        others = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(others, tensor.detach())
        assert torch.equal(*others), name


def _wrapped(rank: int) -> None:
    """DistributedDataParallel does not take new parameters: the model stays as it is, and trains on."""
    model = network()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = adam(wrapped)
    with attach(wrapped, optimizer, "progressive@0%-50%", total_steps=4) as attached:
        for x, y in batches(4):
            optimizer.zero_grad()
            loss(wrapped, x[rank::2], y[rank::2]).backward()
            optimizer.step()
    assert "parameters come or go" in attached.record[0]["failed"]
    assert repr(model) == repr(network())


@pytest.mark.slow
@pytest.mark.parametrize("function", [_averaging, _wrapped])
def test_two_processes_stay_one_model(function, tmp_path):
    spawn(2, tmp_path, function)


class Last(nn.Module):
    """The last token."""

    def forward(self, x):
        return x[:, -1]


def tokens(samples=64) -> Experiment:
    """The task of this file, asked of the last token, as an experiment of the lab."""
    parts = tuple((x, y[:, -1]) for start in (1, 2, 3) for x, y in batches(1, samples, start))
    return Experiment(
        name="tokens",
        model=lambda norm_layer: nn.Sequential(network(norm_layer, norm_layer), Last()),
        data=parts,
        target=0.9,
        optimizer="adamw",
        arms=("layer", "layer->progressive@0%-60%"),
        steps=24,
        eval_every=8,
        batch_size=16,
    )


@pytest.mark.parametrize(
    "arm",
    [
        "layer->progressive@0%-60%",
        pytest.param("progressive@25%-50%->frozen@75%->folded@80%", marks=pytest.mark.slow),
    ],
)
def test_as_an_arm(arm, tmp_path):
    measured = run(cell(arm, lr=0.01), tmp_path, tokens())
    assert measured["state"] == "done"
    done = measured["switches"]
    assert not any("failed" in line for line in done)
    assert done[0]["moved_in_training"] < 1e-5 > done[1]["moved_in_training"]
    assert len(lines(tmp_path)) > 2


@pytest.mark.slow
def test_training_goes_on_behind_it():
    """The real thing, small: accuracy on new data is that of layer norm, within what seeds differ by."""
    found = {}
    for text in ("", "progressive@0%-60%", WHOLE):
        model = network()
        optimizer = adam(model)
        data = list(batches(300, 32))
        with attach(model, optimizer, text or "frozen@100%", total_steps=300):
            train(model, optimizer, data)
        x, y = next(batches(1, 500, 7))
        found[text] = float((model.eval()(x).argmax(-1) == y).float().mean())
    assert found[""] > 0.5  # of three classes; a token sees itself alone
    assert min(found.values()) > found[""] - 0.05, found


def test_the_table_of_a_comparison_speaks_of_its_own_metric():
    """Of what shall be small, less is better; the control has no difference to itself."""
    metric = {"name": "bits per character", "unit": "bits per character", "higher_is_better": False}
    arm = {
        "name": "layer->progressive@0%-60%",
        "lr": 0.01,
        "test": {"mean": 3.6, "low": 3.5, "high": 3.7},
        "runs": {"diverged": 1, "finished": 5},
        "switches": {
            "moved_in_training": 0.0,
            "moved_in_evaluation": 0.02,
            "ms_per_step_before": 8,
            "ms_per_step_after": 6,
        },
    }
    control = {**arm, "name": "layer", "switches": None}
    summary = {"experiment": {"metric": metric}, "points": [{"arms": [control, arm]}]}
    found = strategies.table(summary, {arm["name"]: {"value": 0.2, "low": 0.1, "high": 0.3}})
    assert found.header[2:4] == ["test bits per character", "difference (less is better)"]
    assert found.rows[0][2:5] == ["3.600 [3.500, 3.700]", "–", "1 of 5"]
    assert found.rows[1][0] == "`layer -> progressive@0%-60%`"
    assert found.rows[1][3:] == ["+0.200 [+0.100, +0.300]", "1 of 5", "0", "0.020", "0.75×"]
