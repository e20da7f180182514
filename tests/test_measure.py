"""measure: every number is that of a computation that is plain to see."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import normkit as nk
from measured_models import MODELS
from normkit.measure import QUANTITIES, Collection, collect, measure, packed, updates
from normkit.measure.asked import OF_OPTIMIZER
from normkit.measure.gradients import growth
from normkit.measure.untouched import untouched
from normkit.vocabulary.reading import Reading
from normkit.watching.quantities import ALL


def numbers(model, batch=None, **options):
    """(quantity, module) -> value."""
    return {(r.quantity, r.module): r.value for r in measure(model, batch, **options)}


def off_centre(*shape):
    """Every channel (axis 1) with a mean and a deviation of its own."""
    channels = torch.arange(1.0, shape[1] + 1).view(1, -1, *[1] * (len(shape) - 2))
    return torch.randn(shape) * channels + 3 * channels


# activations


def test_mean_deviation_and_percentiles_are_those_of_all_values():
    x = off_centre(16, 4, 5, 5)
    found = numbers(nn.Sequential(nn.SiLU()), x)
    y = F.silu(x).double()
    assert found["activation_mean", "0"] == pytest.approx(float(y.mean()))
    assert found["activation_std", "0"] == pytest.approx(float(y.std(correction=0)))
    for name, share in (("activation_p15", 0.15), ("activation_p50", 0.5), ("activation_p85", 0.85)):
        assert found[name, "0"] == pytest.approx(float(y.flatten().quantile(share)), rel=1e-6)


def test_percentiles_of_many_values_are_those_of_a_sample_of_them():
    x = torch.randn(64, 8, 32, 32)  # eight times as many as are looked at
    found = numbers(nn.Sequential(nn.Tanh()), x, quantities=["activation_p15", "activation_p85"])
    for name, share in (("activation_p15", 0.15), ("activation_p85", 0.85)):
        exact = float(torch.tanh(x).flatten().kthvalue(round(share * x.numel())).values)
        assert found[name, "0"] == pytest.approx(exact, abs=0.01)  # four standard errors: sqrt(.15 .85 / 65536) / .4


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 3, 3), (6, 5, 8)])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
def test_units_that_never_fire_are_dead(shape, activation):
    units = 2 if len(shape) == 3 else 1  # which axis holds them
    x = torch.rand(shape) + 0.1
    x.movedim(units, 0)[:3] = -5.0
    x.movedim(units, 0)[3, 0] = -5.0  # one that fires sometimes
    assert numbers(nn.Sequential(activation()), x)["dead_share", "0"] == pytest.approx(3 / 8)
    assert ("dead_share", "0") not in numbers(nn.Sequential(nn.Tanh()), x)


@pytest.mark.parametrize(
    ("activation", "ends"), [(nn.Tanh(), (-9.0, 9.0)), (nn.Sigmoid(), (-9.0, 9.0)), (nn.Softsign(), (-99.0, 99.0))]
)
def test_values_at_the_ends_are_saturated(activation, ends):
    x = torch.zeros(4, 10)
    x[:, 0], x[:2, 1] = ends
    assert numbers(nn.Sequential(activation), x)["saturated_share", "0"] == pytest.approx(6 / 40)


def test_tanh_is_saturated_beyond_97_percent():
    x = torch.atanh(torch.tensor([[0.969, 0.971, -0.969, -0.971]]))
    assert numbers(nn.Sequential(nn.Tanh()), x)["saturated_share", "0"] == 0.5


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
@pytest.mark.parametrize("shape", [(7, 40), (40, 7), (5, 3, 4, 4), (300, 12)])
def test_ranks_are_those_of_the_singular_values(shape, scale):
    x = off_centre(*shape) * scale
    found = numbers(nn.Sequential(nn.PReLU(init=0.5)), x, quantities=["stable_rank", "orthogonality_gap"])
    y = F.prelu(x, torch.tensor([0.5]))[:256].flatten(1).double()
    squares = torch.linalg.svdvals(y).square()
    gram = y @ y.T / squares.sum()
    assert found["stable_rank", "0"] == pytest.approx(float(squares.sum() / squares.max()), rel=1e-3)
    gap = torch.linalg.norm(gram - torch.eye(len(y)) / len(y))
    assert found["orthogonality_gap", "0"] == pytest.approx(float(gap), rel=1e-4)


def test_ranks_where_they_are_known():
    equal, apart = torch.ones(9, 20), torch.eye(9, 20) * 3
    found = numbers(nn.Sequential(nn.ReLU()), equal)
    assert found["stable_rank", "0"] == pytest.approx(1)
    assert found["orthogonality_gap", "0"] == pytest.approx(math.sqrt(1 - 1 / 9))
    found = numbers(nn.Sequential(nn.ReLU()), apart)
    assert found["stable_rank", "0"] == pytest.approx(9)
    assert found["orthogonality_gap", "0"] == pytest.approx(0, abs=1e-6)


def test_the_stable_rank_of_singular_values_that_are_close():
    turned = torch.linalg.qr(torch.randn(40, 40)).Q
    lengths = torch.linspace(0.9, 1, 40)
    found = numbers(nn.Sequential(nn.PReLU(init=1.0)), turned * lengths, quantities=["stable_rank"])
    assert found["stable_rank", "0"] == pytest.approx(float(lengths.square().sum()), rel=1e-3)


def test_a_norm_with_an_activation_is_measured_behind_it_and_stays_one():
    model = nn.Sequential(nk.BatchNorm2d(4, activation="relu"))
    found = numbers(model, off_centre(8, 4, 5, 5))
    assert found["activation_p15", "0"] == 0.0
    assert 0.3 < found["activation_mean", "0"] < 0.5  # of half a normal distribution: 0.399
    assert not any(module == "0.activation" for _, module in found)


class NewGELUActivation(nn.Module):
    def forward(self, x):
        return F.gelu(x)


def test_activations_that_others_wrote_go_by_their_name():
    found = numbers(nn.Sequential(nn.Linear(3, 3), NewGELUActivation()), torch.randn(5, 3))
    assert ("dead_share", "1") in found
    assert ("activation_mean", "0") not in found


# statistics


class LayerNorm2d(nn.LayerNorm):
    """As in vision models: of channels, axis 1."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class TinyRMSNorm(nn.Module):
    """As in language models."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), 1e-4

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt() * self.weight


VALUES = {
    "batch 1d": (lambda: nn.BatchNorm1d(6), (4, 6), 4),
    "batch 1d in time": (lambda: nk.BatchNorm1d(6), (4, 6, 5), 20),
    "batch 2d": (lambda: nk.BatchNorm2d(6), (4, 6, 5, 7), 140),
    "batch 3d": (lambda: nn.BatchNorm3d(6), (4, 6, 5, 3, 2), 120),
    "without running statistics": (lambda: nn.BatchNorm2d(6, track_running_stats=False), (4, 6, 5, 7), 140),
    "ghost": (lambda: nk.BatchNorm2d(6, statistics="ghost:3"), (7, 6, 5, 7), 105),  # parts of 3 and 4
    "ghost batches larger than the batch": (lambda: nk.BatchNorm2d(6, statistics="ghost:9"), (4, 6, 5, 7), 140),
    "alone": (lambda: nk.BatchNorm2d(6, statistics=nk.statistics.Synchronized(required=False)), (4, 6, 5, 7), 140),
    "group": (lambda: nn.GroupNorm(2, 6), (4, 6, 5, 7), 105),
    "groups of features": (lambda: nk.GroupNorm(3, 6), (4, 6), 2),
    "layer": (lambda: nn.LayerNorm((6,)), (4, 9, 6), 6),
    "layer over two axes": (lambda: nk.LayerNorm((5, 6)), (4, 5, 6), 30),
    "layer over channels": (lambda: nk.LayerNorm(6, channels_first=True), (4, 6, 5, 5), 6),
    "layer over channels, by its class": (lambda: LayerNorm2d(6), (4, 6, 6, 6), 6),
    "instance": (lambda: nk.InstanceNorm2d(6), (4, 6, 5, 7), 35),
    "rms": (lambda: nk.RMSNorm(6), (4, 9, 6), 6),
    "rms by its name": (lambda: TinyRMSNorm(6), (4, 9, 6), 6),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_that_share_a_mean(name):
    make, shape, values = VALUES[name]
    assert numbers(nn.Sequential(make()), torch.randn(shape))["values_per_channel", "0"] == values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_drift_of_running_statistics(dtype):
    bn = nk.BatchNorm2d(3, dtype=dtype)
    bn.running_mean.copy_(torch.tensor([1.0, -2.0, 0.5]))
    bn.running_var.copy_(torch.tensor([4.0, 0.25, 1.0]))
    x = off_centre(8, 3, 5, 5).to(dtype) + 100
    found = numbers(nn.Sequential(bn), x)
    flat = x.double().movedim(1, 0).flatten(1)
    running_mean, running_var = bn.running_mean.double(), bn.running_var.double()
    moved = (flat.mean(1) - running_mean).abs() / (running_var + bn.eps).sqrt()
    assert found["mean_drift", "0"] == pytest.approx(float(moved.mean()), rel=1e-5)
    grown = ((flat.var(1) + bn.eps) / (running_var + bn.eps)).log().abs()
    assert found["variance_drift", "0"] == pytest.approx(float(grown.mean()), rel=1e-5)


def test_running_statistics_of_the_batch_itself_have_no_drift():
    for make in (
        lambda: nn.BatchNorm2d(3, momentum=1.0),
        lambda: nk.InstanceNorm2d(3, momentum=1.0, track_running_stats=True),
    ):
        norm, x = make(), off_centre(8, 3, 5, 5)
        norm(x)
        found = numbers(nn.Sequential(norm), x)
        assert found["mean_drift", "0"] == pytest.approx(0, abs=1e-6)
        assert found["variance_drift", "0"] == pytest.approx(0, abs=1e-6)


def test_units_that_stand_still():
    x = off_centre(8, 4, 5, 5)
    x[:, 1] = 7.0
    x[:, 2] = x[:, 2] * 1e-6
    x[:, 3] = x[:, 3] * 5e-3  # quiet, and still above eps
    found = numbers(nn.Sequential(nk.BatchNorm2d(4, eps=1e-5)), x)
    assert found["constant_share", "0"] == 0.5
    assert found["least_variance_over_eps", "0"] == 0
    x[:, 1] = off_centre(8, 4, 5, 5)[:, 1]
    found = numbers(nn.Sequential(nn.BatchNorm2d(4, eps=1e-5)), x)
    assert found["least_variance_over_eps", "0"] == pytest.approx(
        float(x[:, 2].double().var(correction=0)) / 1e-5, rel=1e-4
    )
    quiet = torch.full((4, 6), 1e-3)  # has no variance, and a mean square of 1e-6
    assert numbers(nn.Sequential(TinyRMSNorm(6)), quiet)["least_variance_over_eps", "0"] == pytest.approx(1e-2)
    assert numbers(nn.Sequential(nn.RMSNorm(6)), quiet)["least_variance_over_eps", "0"] == pytest.approx(
        1e-6 / torch.finfo(torch.float32).eps
    )


@pytest.mark.parametrize("alike", [False, True])
def test_the_noise_is_that_of_many_batches(alike):
    """Standard deviation of mean and variance over 400 batches; ``alike``: all values of a sample are the same."""
    draw = lambda n: torch.randn(n, 3, *([1, 1] if alike else [4, 4])).expand(n, 3, 4, 4) * 2 + 5
    batches = [draw(32) for _ in range(400)]
    means = torch.stack([x.mean((0, 2, 3)) for x in batches])
    variances = torch.stack([x.var((0, 2, 3), correction=0) for x in batches])
    found = [
        numbers(nn.Sequential(nn.BatchNorm2d(3)), x, quantities=["batch_noise", "variance_noise"]) for x in batches[:50]
    ]
    average = lambda name: sum(one[name, "0"] for one in found) / len(found)
    assert average("batch_noise") == pytest.approx(float(means.std(0).mean()) / 2, rel=0.06)
    assert average("variance_noise") == pytest.approx(float(variances.std(0).mean()) / 4, rel=0.06)


def test_the_noise_of_plain_features_in_closed_form():
    x = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    found = numbers(nn.Sequential(nk.BatchNorm1d(1)), x)
    assert found["batch_noise", "0"] == pytest.approx(math.sqrt((4 / 3) / 4))
    assert found["variance_noise", "0"] == pytest.approx(0)


def test_the_noise_is_that_of_the_channels_that_move():
    x = off_centre(16, 3, 4, 4)
    still = torch.cat([x, torch.full((16, 2, 4, 4), 7.0)], 1)
    asked = ["batch_noise", "variance_noise"]
    alone, beside = (numbers(nn.Sequential(nn.BatchNorm2d(y.shape[1])), y, quantities=asked) for y in (x, still))
    assert beside == {key: pytest.approx(value, rel=1e-6) for key, value in alone.items()}


def test_of_samples_of_unequal_length_the_shortest_counts():
    norm, x = nk.InstanceNorm1d(2), torch.randn(3, 2, 5)
    with untouched(norm), Collection(norm, ["values_per_channel"]) as collection:
        norm(x, lengths=torch.tensor([5, 2, 3]))
    assert [float(value) for _, _, value in collection.pending()] == [2.0]


@pytest.mark.parametrize("how", ["mask", "lengths"])
def test_padding_that_is_masked_counts_for_nothing(how):
    lengths = torch.tensor([5, 2, 1])
    keep = torch.arange(5) < lengths[:, None]
    x = torch.where(keep[:, None], off_centre(3, 2, 5), 1e6)
    bn = nk.BatchNorm1d(2)
    given = {"mask": keep} if how == "mask" else {"lengths": lengths}
    collection = Collection(bn, ["values_per_channel", "mean_drift"])
    with untouched(bn), collection:
        bn(x, **given)
    found = {quantity: float(value) for quantity, _, value in collection.pending()}
    means = x.movedim(1, -1)[keep].mean(0)
    assert found == {"values_per_channel": 8, "mean_drift": pytest.approx(float(means.abs().mean()), rel=1e-4)}


def test_what_is_read_off_without_data():
    bn = nk.BatchNorm1d(4)
    with torch.no_grad():
        bn.weight.copy_(torch.tensor([0.0, 5e-4, -2.0, 1.5]))
        bn.running_mean[1], bn.running_var[:2] = math.nan, math.inf
    found = numbers(nn.Sequential(bn))
    assert found["kind", "0"] == "batch_norm"
    expected = {"running_nonfinite": 3, "scale_zero_share": 0.5, "scale_least": 0, "scale_greatest": 2}
    assert {name: found[name, "0"] for name in expected} == expected


# precision


class RoughNorm(nn.Module):
    """A quarter too much, or without end, in half precision."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return x * self.factor if x.dtype == torch.bfloat16 else x * 1.0


@pytest.mark.parametrize(("factor", "error"), [(1.25, 0.25), (1.0, 0.0), (math.inf, math.inf)])
def test_the_error_of_half_precision_in_closed_form(factor, error):
    norm, x, calls = RoughNorm(factor), torch.tensor([[1.0, 2.0, -4.0]]), []
    norm.register_forward_hook(lambda *_: calls.append(1))
    found = numbers(nn.Sequential(norm), x.bfloat16(), quantities=["arithmetic_error"])
    assert found == {("arithmetic_error", "0"): pytest.approx(error)}
    assert calls == [1]  # the hooks of others hear the one pass that is measured
    assert norm.seen == 0
    assert numbers(nn.Sequential(norm), x, quantities=["arithmetic_error"]) == {}


def test_norms_that_compute_in_float32_have_no_error_in_half_precision():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nk.BatchNorm2d(8, activation="relu"), nn.GroupNorm(2, 8), nn.Flatten())
    model = nn.Sequential(*model, nk.LayerNorm(8 * 25), nn.RMSNorm(8 * 25)).bfloat16()
    found = numbers(model, 4 * torch.randn(5, 3, 7, 7).bfloat16() + 30, quantities=["arithmetic_error"])
    assert {name: round(value, 4) for (_, name), value in found.items()} == {"1": 0.0, "2": 0.0, "4": 0.0, "5": 0.0}
    torchs = numbers(nn.BatchNorm1d(8).bfloat16(), 30 + torch.randn(9, 8).bfloat16(), quantities=["arithmetic_error"])
    assert torchs["arithmetic_error", ""] > 0.02  # its mean has the type of its parameters


# evaluations


def test_the_gaps_between_three_evaluations():
    model, x = nn.Sequential(nk.BatchNorm1d(3), nn.Dropout(0.5)), off_centre(64, 3)
    target = torch.randn(64, 3)
    model[0].running_var.fill_(4.0)
    found = numbers(model, (x, target), loss_fn=F.mse_loss)
    running = (x / math.sqrt(4 + 1e-5)).double()
    by_batch = ((x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()).double()
    gap = (by_batch - running).norm() / running.norm()
    assert found["batch_statistics_gap", ""] == pytest.approx(float(gap), rel=1e-5)
    assert found["loss_running", ""] == pytest.approx(float(F.mse_loss(running.float(), target)), rel=1e-5)
    assert found["loss_batch_statistics", ""] == pytest.approx(float(F.mse_loss(by_batch.float(), target)), rel=1e-5)
    torch.manual_seed(4)
    found = numbers(model, (x, target), loss_fn=F.mse_loss)
    torch.manual_seed(4)
    dropped = model(x).detach().double()  # of the same random numbers
    assert found["loss_training", ""] == pytest.approx(float(F.mse_loss(dropped.float(), target)), rel=1e-5)
    assert found["train_eval_gap", ""] == pytest.approx(float((dropped - running).norm() / running.norm()), rel=1e-5)


def test_a_model_without_batch_norm_and_dropout_has_no_gap():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), torch.randn(8, 4)
    found = numbers(model, x)
    assert found["train_eval_gap", ""] == 0
    assert ("batch_statistics_gap", "") not in found


# gradients and updates


def test_gradients_are_those_of_a_backward_pass():
    model, (x, target), loss = MODELS["normkit batch norm"]()
    torch.manual_seed(9)
    found = numbers(model, (x, target), loss_fn=loss)
    torch.manual_seed(9)
    loss(model(x), target).backward()
    for name, p in model.named_parameters():
        assert found["gradient_norm", name] == pytest.approx(float(p.grad.norm()), rel=1e-6)
        assert found["gradient_nonfinite", name] == 0
        if p.dim() > 1:
            weight = p.detach()
            assert found["gradient_to_weight", name] == pytest.approx(float(p.grad.norm() / weight.norm()), rel=1e-6)
            along = (p.grad * weight).sum().abs() / (p.grad.norm() * weight.norm())
            assert found["gradient_along_weight", name] == pytest.approx(float(along), abs=1e-6)
        else:
            assert ("gradient_to_weight", name) not in found


def test_gradients_that_are_no_numbers_are_counted():
    model = nn.Sequential(nn.Linear(2, 2))
    found = numbers(model, torch.ones(1, 2), loss_fn=lambda output, _: (output * torch.tensor([1.0, math.inf])).sum())
    assert found["gradient_nonfinite", "0.weight"] == 2
    assert found["gradient_nonfinite", "0.bias"] == 1


def test_parameters_without_a_gradient_have_no_reading():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    found = numbers(model, torch.ones(1, 2), loss_fn=lambda output, _: output.sum())
    assert {name for quantity, name in found if quantity == "gradient_norm"} == {"1.weight", "1.bias"}
    model.requires_grad_(False)
    assert not [
        name for quantity, name in numbers(model, torch.ones(1, 2), loss_fn=lambda y, _: y.sum()) if "grad" in quantity
    ]


def test_growth_in_closed_form():
    norms = [torch.tensor(5.0 * 1.3**power) for power in (4, 3, 2, 1, 0)]
    found = growth(norms)
    assert float(found["gradient_growth"]) == pytest.approx(1.3**2)
    assert float(found["gradient_ratio"]) == pytest.approx(1.3**4)
    assert growth(norms[:1]) == {}


def test_a_step_of_an_optimizer_in_closed_form():
    old = {"turned": torch.tensor([3.0, 4.0]), "grown": torch.tensor([[1.0, 2.0]])}
    new = {"turned": torch.tensor([-4.0, 3.0]), "grown": torch.tensor([[1.01, 2.02]])}
    found = {
        (q, name): float(v) for q, name, v in updates.read(old, new, frozenset(["update_to_weight", "angle_per_step"]))
    }
    assert found["update_to_weight", "turned"] == pytest.approx(math.sqrt(2))
    assert found["angle_per_step", "turned"] == pytest.approx(math.pi / 2)
    assert found["update_to_weight", "grown"] == pytest.approx(0.01, rel=1e-4)
    assert found["angle_per_step", "grown"] == pytest.approx(0, abs=1e-6)


def test_a_small_angle_is_not_lost():
    a = F.normalize(torch.randn(1000), dim=0)
    aside = torch.randn(1000)
    aside = F.normalize(aside - (aside @ a) * a, dim=0)
    assert float(updates.angle(a, a + 1e-5 * aside)) == pytest.approx(1e-5, rel=0.02)  # the cosine would be 1


def test_effective_learning_rates_of_weights_right_before_a_norm():
    model = nn.Sequential(
        nn.Linear(4, 6), nk.BatchNorm1d(6), nn.ReLU(),      # a bias before batch norm does not matter
        nn.Linear(6, 6), nn.LayerNorm(6),                   # before layer norm it does
        nn.Linear(6, 6, bias=False), nk.RMSNorm(6),
        nn.Linear(6, 6), nn.ReLU(), nn.BatchNorm1d(6),      # not right before it
        nn.Linear(6, 6), nn.BatchNorm1d(6).eval(),          # by given statistics: an affine map
        nn.Linear(6, 2),
    )  # fmt: skip
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[5].parameters()}], lr=0.1
    )
    batch = torch.randn(9, 4), torch.randn(9, 2)
    found = numbers(model, batch, loss_fn=F.mse_loss, optimizer=optimizer)
    rates = {name: value for (quantity, name), value in found.items() if quantity == "effective_learning_rate"}
    expected = {
        "0.weight": 0.5 / float(model[0].weight.detach().square().sum()),
        "5.weight": 0.1 / float(model[5].weight.detach().square().sum()),
    }
    assert rates == {name: pytest.approx(value) for name, value in expected.items()}


class PreActivation(nn.Module):
    """What the layer hands to the norm goes past it as well."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.out = nn.Linear(4, 6), nk.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.out(x + torch.relu(self.norm(x)))


def test_a_weight_that_is_read_past_the_norm_has_a_scale():
    model, batch = PreActivation(), (torch.randn(9, 4), torch.randn(9, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    asked = ["effective_learning_rate"]
    assert measure(model, batch, loss_fn=F.mse_loss, optimizer=optimizer, quantities=asked) == []
    model.forward = lambda x: model.out(torch.relu(model.norm(model.stem(x))))
    found = measure(model, batch, loss_fn=F.mse_loss, optimizer=optimizer, quantities=asked)
    assert [(reading.quantity, reading.module) for reading in found] == [("effective_learning_rate", "stem.weight")]


def test_how_often_running_statistics_move_per_step():
    model = nn.Sequential(nk.BatchNorm1d(2), nn.LayerNorm(2))
    before = updates.counts(model)
    for _ in range(6):
        model(torch.randn(4, 2))
    assert [(q, name, float(v)) for q, name, v in updates.moves(before, model, 3)] == [("statistics_moves", "0", 2.0)]


# what is asked for, and how it comes


def test_a_reading_has_the_unit_of_its_quantity():
    readings = measure(nn.Sequential(nk.BatchNorm1d(2)), torch.randn(8, 2), quantities=["values_per_channel"])
    assert readings == [Reading("values_per_channel", 8.0, "0", None, "values")]
    assert packed([("loss", "", torch.tensor(2))], step=7) == [Reading("loss", 2.0, "", 7, "loss")]
    assert packed([]) == []


class Waits(TorchDispatchMode):
    """Counts the operators whose result Python waits for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in str(function) or "nonzero" in str(function)
        return function(*args, **(kwargs or {}))


def test_nobody_waits_for_a_layer():
    def waits(layers):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()) for _ in range(layers)))
        with Waits() as seen:
            collect.numbers(model, (torch.randn(8, 4), torch.randn(8, 4)), loss_fn=F.mse_loss)
        return seen.count

    assert waits(8) == waits(2)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["activation_men"], "did you mean 'activation_mean'"),
        (["activation_mean"], "activation_mean needs a forward pass.\n  give batch="),
        (["gradient_norm"], "gradient_norm needs a backward pass.\n  give batch= and loss_fn="),
        (["update_to_weight"], "use normkit.watch"),
        (["explosion_rate"], "passes of its own"),
    ],
)
def test_what_cannot_be_measured_is_said(asked, words):
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        measure(nn.Linear(2, 2), quantities=asked)


def test_learning_rates_take_an_optimizer():
    with pytest.raises(ValueError, match="effective_learning_rate needs learning rates"):
        measure(nn.Linear(2, 2), torch.randn(3, 2), loss_fn=F.mse_loss, quantities=["effective_learning_rate"])


@pytest.mark.parametrize("loss", [lambda output, _: output, lambda output, _: 3.0])
def test_a_loss_that_is_no_number_is_refused(loss):
    with pytest.raises(ValueError, match="a loss is one number"):
        measure(nn.Linear(2, 2), torch.randn(3, 2), loss_fn=loss)


def test_what_is_not_asked_for_is_not_measured():
    model, batch, loss = MODELS["normkit batch norm"]()
    for name, quantity in QUANTITIES.items():
        if quantity.stage in ("model", "batch", "gradients") and name not in OF_OPTIMIZER:
            found = measure(model, batch, loss_fn=loss, quantities=[name])
            assert {reading.quantity for reading in found} <= {name}


def test_a_call_of_ones_own():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nk.BatchNorm1d(2)

        def forward(self, a, scale):
            return self.norm(a * scale)

    batch = {"features": torch.randn(8, 2)}
    found = numbers(Two(), batch, call=lambda model, batch: model(batch["features"], 2.0))
    assert found["values_per_channel", "norm"] == 8


def test_every_quantity_says_what_it_is():
    for name, quantity in ALL.items():
        signs = any(sign in quantity.formula for sign in ("|", " / ", "^", "min ", "max "))
        assert quantity.means.endswith(".") or (not signs or quantity.stage == "model"), name
        assert name == quantity.name
        assert quantity.formula
        assert quantity.paper == "" or "arXiv:" in quantity.paper


def test_numbers_are_fetched_together(monkeypatch):
    """One transfer per device; in float64, whatever they were."""
    looks = []
    own = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: looks.append(t.shape) or own(t))
    tensors = [torch.tensor(3), torch.tensor([0.5]), torch.tensor(1e-300, dtype=torch.float64)]
    assert collect.fetched(tensors) == [3.0, 0.5, 1e-300]
    assert looks == [(3,)]
    assert collect.fetched([]) == []
