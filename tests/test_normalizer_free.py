"""Residual networks without their norms: what keeps the variance, what is refused, and that it can be taken back."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normkit as nk
from normkit.bench.models import ResNet
from normkit.blocks import Scale, ScaledWSConv2d, ScaledWSLinear


class PreActivation(nn.Module):
    """norm, SiLU, convolution, twice, plus the input; no norm at the end of the branch."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, out, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nk.BatchNorm2d(out, activation="silu"), nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, out, 1) if channels != out else None

    def forward(self, x):
        y = self.conv2(self.norm2(self.conv1(F.silu(self.norm1(x)))))
        return torch.add(y, x if self.shortcut is None else self.shortcut(x))


def pre_activation() -> nn.Module:
    blocks = [PreActivation(16, 16), PreActivation(16, 32), PreActivation(32, 32), PreActivation(32, 32)]
    last = [nn.GroupNorm(4, 32), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *blocks, *last)


class Dense(nn.Module):
    """A residual perceptron block, the sum by keyword of the shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.second(torch.relu(self.norm(self.first(x))))


MODELS = {
    "bottlenecks": (
        lambda: ResNet(width=8, blocks=(2, 3, 1, 1), classes=10),
        lambda n: torch.randn(n, 3, 40, 40),
        "stages.1",
    ),
    "pre-activation": (pre_activation, lambda n: torch.randn(n, 3, 12, 12), "3"),
    "perceptron": (
        lambda: nn.Sequential(nn.Linear(8, 64), *(Dense(64) for _ in range(30)), nn.Linear(64, 10)),
        lambda n: 3 * torch.randn(n, 8) + 1,
        "20",
    ),
}
each_model = pytest.mark.parametrize("name", MODELS)


def converted(name: str, **options):
    build, batch, _ = MODELS[name]
    model = build()
    return model, nk.convert_(model, to="normalizer-free", match=batch(64), **options), batch


def variances_behind(model: nn.Module, names: list[str], x: torch.Tensor) -> dict[str, float]:
    """By plain hooks on the modules of the blocks."""
    seen, handles = {}, []
    for name in names:
        keep = lambda module, args, y, name=name: seen.__setitem__(name, y.detach().var().item())
        handles.append(model.get_submodule(name).register_forward_hook(keep))
    model.eval()(x)
    for handle in handles:
        handle.remove()
    return seen


@each_model
def test_the_variance_stays_near_one_through_the_depth_on_fresh_data(name):
    model, certificate, batch = converted(name)
    told = {reading.module: reading.value for reading in certificate.readings if reading.quantity == "variance"}
    seen = variances_behind(model, [*told], batch(64))
    assert MODELS[name][2] in told
    assert all(0.5 <= variance <= 2 for variance in (*told.values(), *seen.values()))
    assert all(seen[block] == pytest.approx(told[block], rel=0.3) for block in told)
    assert f"variance behind the {len(told)} blocks" in repr(certificate)


@each_model
def test_no_norm_remains_and_the_model_trains(name):
    model, _, batch = converted(name)
    assert not any(nk.surgery.recast.is_norm(m) for m in model.modules() if not isinstance(m, nn.Identity))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x, target = batch(24), torch.randint(0, 10, (24,))
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(model.train()(x), target)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@each_model
def test_what_is_saved_is_all_there_is(name):
    """Another batch gives other gains; the checkpoint has them."""
    model, _, batch = converted(name)
    other, _, _ = converted(name)
    x = batch(4)
    assert not other.eval()(x).equal(model.eval()(x))
    other.load_state_dict(model.state_dict())
    assert other.eval()(x).equal(model.eval()(x))


@each_model
def test_it_can_be_taken_back(name):
    build, batch, _ = MODELS[name]
    model, x = build(), batch(64)
    before, state = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    certificate = nk.convert_(model, to="normalizer-free", match=x)
    assert [*model.state_dict()] != [*state]
    certificate.undo()
    assert repr(model) == repr(before)
    assert all(value.equal(model.state_dict()[key]) for key, value in state.items())
    assert [module.training for module in model.modules()] == modes
    assert model.eval()(x).equal(before.eval()(x))


def test_what_becomes_of_each_layer():
    model, _, _ = converted("bottlenecks")
    block = model.stages[0]
    assert type(block.conv1) is type(block.shortcut[0]) is type(model.conv) is ScaledWSConv2d
    assert isinstance(block.bn1, nn.Identity)
    assert isinstance(block.bn3.scale, nn.Parameter)
    assert block.bn3.scale.item() == pytest.approx(0.2)
    assert isinstance(model.bn, Scale)
    assert not isinstance(model.bn.scale, nn.Parameter)
    assert type(model.head) is nn.Linear
    model, _, _ = converted("pre-activation")
    assert isinstance(model[1].norm1, Scale)
    assert isinstance(model[1].norm2, nn.SiLU)  # the activation that the norm had
    assert model[1].conv2.gain[0] < 0.5  # a branch without a norm at its end: the last gain makes it small
    model, _, _ = converted("perceptron")
    assert type(model[3].first) is ScaledWSLinear
    assert type(model[-1]) is nn.Linear


def test_the_optimizer_follows():
    build, batch, _ = MODELS["bottlenecks"]
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nk.convert_(model, to="normalizer-free", match=batch(16), optimizer=optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_a_plan_changes_nothing():
    build, batch, _ = MODELS["bottlenecks"]
    model = build()
    before = repr(model)
    certificate = nk.plan(nk.convert_, model, to="normalizer-free", match=batch(16))
    assert "standardises its weights" in certificate.verdict
    assert repr(model) == before


class Untraceable(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Twice(Dense):
    def forward(self, x):
        return x + self.second(self.norm(self.second(x)))


REFUSED = {
    "no batch": (lambda: pre_activation(), None, r"give match=, a batch"),
    "no skip": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)),
        torch.randn(8, 8),
        r"no sum of a shortcut and a branch",
    ),
    "untraceable": (Untraceable, torch.randn(8, 8), r"Untraceable cannot be traced"),
    "called twice": (lambda: nn.Sequential(Twice(8)), torch.randn(8, 8), r"0\.second is called twice"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_says_why_and_changes_nothing(case):
    build, match, words = REFUSED[case]
    model = build()
    before = repr(model)
    with pytest.raises(ValueError, match=words):
        nk.convert_(model, to="normalizer-free", match=match)
    assert repr(model) == before


def test_a_variance_outside_of_the_limits_is_refused_with_the_block():
    """What is measured on data of one kind does not hold on another."""
    model = MODELS["perceptron"][0]()
    x = torch.cat([torch.randn(32, 8), 100 * torch.randn(32, 8)])  # the second half is what the check sees
    with pytest.raises(ValueError, match=r"behind \d+ the variance is .*, outside of \[0\.5, 2\]"):
        nk.convert_(model, to="normalizer-free", match=x)


@pytest.mark.slow
def test_a_resnet_50():
    model = ResNet()
    certificate = nk.convert_(model, to="normalizer-free", match=torch.randn(8, 3, 96, 96))
    told = [reading.value for reading in certificate.readings if reading.quantity == "variance"]
    assert len(told) == 16
    assert all(0.5 <= variance <= 2 for variance in told)
