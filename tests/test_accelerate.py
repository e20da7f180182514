"""nk.accelerate_: the same outputs, gradients and buffers in every mode, in fewer calls."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normkit as nk
from same_training import EPS, assert_same, note_calls
from written_models import MODELS, BasicBlock, UNetBlock, images, make


@pytest.fixture
def calls(monkeypatch) -> list[tuple[bool, bool]]:
    return note_calls(monkeypatch)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_gradients_and_buffers_are_the_same_in_training_evaluation_and_training_again(name):
    model, x = make(name)
    original = copy.deepcopy(model)
    nk.accelerate_(model, example_inputs=x)
    assert_same(model, original, x, True, False, True)


@pytest.mark.parametrize("name", MODELS)
def test_every_pattern_becomes_one_call(name, calls):
    model, x = make(name)
    nk.accelerate_(model, example_inputs=x)
    calls.clear()
    model(x)
    assert sum(residual or activation for residual, activation in calls) == MODELS[name][2]


def test_a_residual_and_an_activation_come_in_one_call(calls):
    block = BasicBlock(3, 3)
    nk.accelerate_(block)
    block(images())
    assert calls == [(False, True), (True, True)]


def test_an_optimizer_made_before_trains_the_model():
    model, x = make("resnet")
    original = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9) for m in (model, original)]
    nk.accelerate_(model, optimizer=optimizers[0])
    target = torch.randn(5, 5)
    for m, optimizer in zip((model, original), optimizers, strict=True):
        for _ in range(3):
            optimizer.zero_grad()
            (m(x) * target).sum().backward()
            optimizer.step()
    start = dict(make("resnet")[0].named_parameters())
    moved = max(float((p - start[name]).detach().abs().max()) for name, p in original.named_parameters())
    assert moved > 0.01
    for (name, ours), theirs in zip(model.named_parameters(), original.parameters(), strict=True):
        # Three steps, each through 13 norms; the gradient of a bias before a norm is nothing but rounding.
        assert (ours - theirs).detach().abs().max() <= 1e-3 * moved, name


def test_an_embedding_that_is_sometimes_given_is_never_lost():
    block, other = (UNetBlock(8, 8) for _ in range(2))  # two channels per group: one alone would lose the embedding
    other.load_state_dict(block.state_dict())
    nk.accelerate_(block)  # the trace has emb=None
    x, emb = torch.randn(2, 8, 6, 6) * 3 + 1, torch.rand(2, 6)
    assert torch.allclose(block(x), other(x), rtol=1e-5, atol=1e-5)
    assert torch.allclose(block(x, emb), other(x, emb), rtol=1e-5, atol=1e-5)
    assert torch.allclose(block(x, emb=emb), other(x, emb=emb), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(block(x, emb), block(x))


def test_wrong_arguments_raise_what_they_always_raised():
    block = UNetBlock(4, 4)
    nk.accelerate_(block)
    x = torch.rand(2, 4, 6, 6)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        block()
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        block(x, embedding=x)


def test_modules_that_one_leaves_out_are_left_out():
    model, _ = make("resnet")
    certificate = nk.accelerate_(model, filter_fn=lambda module, name: not name.startswith("layer1"))
    assert all(type(m) is nn.BatchNorm2d for m in model.layer1.modules() if isinstance(m, nn.BatchNorm2d))
    assert isinstance(model.stem[1], nk.BatchNorm2d)
    assert {row.module for row in certificate.skipped} >= {"layer1.0", "layer1.0.bn1", "layer1.1.downsample.1"}
    assert not any(row.module.startswith("layer1") for row in certificate.changed)


class TwoUses(nn.Module):
    """One norm, once with and once without an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.map = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.map(F.relu(self.norm(x))))


def test_a_norm_that_is_used_in_two_ways_is_used_in_two_ways(calls):
    model = TwoUses()
    original = copy.deepcopy(model)
    nk.accelerate_(model)
    x = torch.randn(9, 4) * 3 + 2
    assert_same(model, original, x, True, False, True)
    assert calls[:2] == [(False, True), (False, False)]


class Functional(nn.Module):
    """Norms without modules, and a residual that is broadcast in one call and not in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4) + 0.5)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        y = F.silu(F.layer_norm(x, (4,), self.weight))
        return F.relu(self.norm(y) + r) + F.group_norm(y, 2)


@pytest.mark.parametrize("shape", [(6, 4), (1, 4), (3, 6, 4)])
def test_functional_norms_and_broadcast_residuals(shape):
    model = Functional()
    other = copy.deepcopy(model)
    assert "layer_norm + silu" in repr(nk.accelerate_(model))
    x, r = torch.randn(6, 4) * 3 + 1, torch.randn(shape)
    assert torch.allclose(model(x, r), other(x, r), rtol=1e-5, atol=1e-6)
    mixed = model(x, r.double())
    assert mixed.dtype == torch.float64
    assert torch.allclose(mixed, other(x, r.double()), rtol=1e-5, atol=1e-6)


def test_per_sample_gradients_are_those_of_the_original():
    block = UNetBlock(4, 4)
    other = copy.deepcopy(block)
    nk.accelerate_(block)
    x = torch.randn(3, 4, 6, 6) * 3 + 1
    upstream = torch.randn(4, 6, 6)

    def gradients(model):
        def loss(parameters, sample):
            return (torch.func.functional_call(model, parameters, (sample[None],))[0] * upstream).sum()

        per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
        return per_sample({name: p.detach() for name, p in model.named_parameters() if "embed" not in name}, x)

    ours, theirs = gradients(block), gradients(other)
    for name, expected in theirs.items():
        assert (ours[name] - expected).abs().max() <= 256 * EPS * expected.abs().max().clamp_min(1), name


def test_the_probe_leaves_no_trace():
    model, x = make("resnet")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    certificate = nk.accelerate_(nn.Sequential(model, nn.Dropout(0.5)), example_inputs=x)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [row.training for row in certificate.agreement] == [False, True]
    assert all(0 <= row.error <= row.limit < 1e-3 for row in certificate.agreement)
    assert all(m.num_batches_skipped == 0 for m in model.modules() if isinstance(m, nk.BatchNorm2d))


def test_a_probe_that_the_model_does_not_take_is_refused():
    model, _ = make("resnet")
    with pytest.raises(ValueError, match="the model raises RuntimeError on them in evaluation"):
        nk.accelerate_(model, example_inputs=torch.rand(2, 4, 8, 8))
    assert type(model.stem[1]) is nn.BatchNorm2d


def test_the_probe_may_be_a_dict_or_a_tuple():
    x, emb = torch.randn(2, 4, 6, 6) * 3 + 1, torch.rand(2, 6)
    for inputs in ((x, emb), {"x": x, "emb": emb}):
        certificate = nk.accelerate_(UNetBlock(4, 4), example_inputs=inputs)
        assert certificate.agreement
        assert certificate.refused == ()
