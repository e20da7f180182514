"""Theory probes: cases with a closed form, and what the papers found of batch norm at initialisation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normkit as nk
from normkit.measure import activation_drift, explosion_rate, internal_covariate_shift, landscape, measure
from normkit.measure.theory import LENGTHS


def values(readings):
    return {(reading.quantity, reading.module): reading.value for reading in readings}


class Quadratic(nn.Module):
    """L(w) = sum of a w² / 2."""

    def __init__(self, curvature, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))
        self.register_buffer("curvature", torch.tensor(curvature, dtype=torch.float64))

    def forward(self, x):
        return (self.curvature * self.weight.square()).sum() / 2


def the_output(output, target):
    return output


def test_the_landscape_of_a_quadratic():
    a, w, lr = torch.tensor([3.0, 0.5, 7.0]), torch.tensor([1.0, -2.0, 0.3]), 0.2
    model = Quadratic(a.tolist(), w.tolist())
    found = values(landscape(model, torch.zeros(1), loss_fn=the_output, lr=lr))
    steps = [lr * length for length in LENGTHS]
    losses = [float((a * (w * (1 - t * a)).square()).sum() / 2) for t in steps]
    g, hessian_g = a * w, a * a * w
    assert LENGTHS[0] == 0.5
    assert LENGTHS[-1] == pytest.approx(4)
    assert found["loss_range", ""] == pytest.approx(max(losses) - min(losses), rel=1e-6)
    assert found["relative_loss", ""] == pytest.approx(max(losses) / float((a * w * w).sum() / 2), rel=1e-6)
    assert found["gradient_predictiveness", ""] == pytest.approx(steps[-1] * float(hessian_g.norm()), rel=1e-6)
    assert found["effective_smoothness", ""] == pytest.approx(float(hessian_g.norm() / g.norm()), rel=1e-6)


def test_smoothness_lies_between_the_least_and_the_greatest_curvature():
    found = values(landscape(Quadratic([2.0, 9.0], [1.0, 1.0]), torch.zeros(1), loss_fn=the_output, lr=0.01))
    assert 2 < found["effective_smoothness", ""] < 9


class Quartic(Quadratic):
    """L(w) = w⁴ / 4: its gradient is w³, and no step along it has the slope of another."""

    def forward(self, x):
        return self.weight.pow(4).sum() / 4


def test_the_smoothness_is_the_greatest_slope_on_the_way():
    w, lr = 1.0, 0.3
    found = values(landscape(Quartic([1.0], [w]), torch.zeros(1), loss_fn=the_output, lr=lr))
    slopes = [abs((w - lr * t * w**3) ** 3 - w**3) / (lr * t * w**3) for t in LENGTHS]
    assert max(slopes) > 1.5 * min(slopes)
    assert found["effective_smoothness", ""] == pytest.approx(max(slopes), rel=1e-6)


class Chain(nn.Module):
    """Scalars in a row: L = v u x."""

    def __init__(self, u, v):
        super().__init__()
        self.first, self.second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.first.weight, u)
        nn.init.constant_(self.second.weight, v)

    def forward(self, x):
        return self.second(self.first(x)).sum()


def test_the_covariate_shift_of_two_scalars():
    """Of L = v u x: the gradient of v is u x, and (u - lr v x) x after the step of u."""
    u, v, x, lr = 2.0, 3.0, 1.5, 0.1
    readings = internal_covariate_shift(Chain(u, v), torch.tensor([[x]]), loss_fn=the_output, lr=lr)
    assert values(readings) == {
        ("internal_covariate_shift", "second"): pytest.approx(lr * v * x * x),
        ("gradient_cosine", "second"): pytest.approx(1.0),
    }
    turned = internal_covariate_shift(Chain(u, v), torch.tensor([[x]]), loss_fn=the_output, lr=1.0)
    assert values(turned)["gradient_cosine", "second"] == pytest.approx(-1.0)  # u - v x < 0


def test_the_covariate_shift_is_that_of_two_backward_passes():
    """Layer by layer: a copy of the model whose earlier layers have made their step."""
    torch.manual_seed(3)
    make = lambda: nn.Sequential(
        nn.Linear(5, 8), nk.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    model, other = make().double(), make().double()
    other.load_state_dict(model.state_dict())
    batch = torch.randn(16, 5, dtype=torch.float64), torch.randint(0, 3, (16,))
    gradient = torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), list(model.parameters()))
    found = values(internal_covariate_shift(model, batch, loss_fn=F.cross_entropy, lr=0.7))
    before = {name: g for (name, _), g in zip(model.named_parameters(), gradient, strict=True)}
    layers = ["0", "1", "3", "5"]
    for place, layer in enumerate(layers[1:], 1):
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if name.split(".")[0] in layers[:place]:
                    parameter -= 0.7 * before[name]
        own = [f"{layer}.weight", f"{layer}.bias"]
        now = torch.autograd.grad(
            F.cross_entropy(other(batch[0]), batch[1]), [other.get_parameter(name) for name in own]
        )
        g = torch.cat([before[name].flatten() for name in own])
        g_after = torch.cat([one.flatten() for one in now])
        assert found["internal_covariate_shift", layer] == pytest.approx(float((g - g_after).norm()), rel=1e-8)
        cosine = float(F.cosine_similarity(g, g_after, 0))
        assert found["gradient_cosine", layer] == pytest.approx(cosine, rel=1e-8)
    assert len(found) == 2 * 3


def test_the_drift_of_a_scalar():
    """y = w x, of deviation w std(x): one step of L = mean(y) moves the mean of y by lr mean(x)²."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.PReLU(init=1.0).requires_grad_(False))
    nn.init.constant_(model[0].weight, 2.0)
    x = torch.randn(64, 1) + 3
    found = values(activation_drift(model, x, loss_fn=lambda output, _: output.mean(), lr=0.1))
    moved = 0.1 * float(x.mean()) ** 2 / (2 * float(x.std(correction=0)))
    assert found == {("activation_drift", "1"): pytest.approx(moved, rel=1e-5)}


def test_the_drift_of_a_unit_that_stands_still_does_not_count():
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
    x = torch.rand(32, 1) + 1
    found = values(activation_drift(model, x, loss_fn=lambda output, _: output.mean(), lr=0.1))
    moved = 0.1 * float(x.mean()) / 2 * float(x.mean()) / float(x.std(correction=0))
    assert found["activation_drift", "1"] == pytest.approx(moved, rel=1e-5)


def test_the_explosion_of_scalars():
    """Every layer doubles, so the gradient of what is before it is twice as large: four times, squared."""
    layers = [layer for _ in range(6) for layer in (nn.Linear(1, 1, bias=False), nn.ReLU(inplace=True))]
    for layer in layers[::2]:
        nn.init.constant_(layer.weight, 2.0)
    found = values(explosion_rate(nn.Sequential(*layers), torch.ones(3, 1), loss_fn=lambda y, _: y.sum()))
    assert found["explosion_rate", ""] == pytest.approx(4, rel=1e-5)
    assert [found["output_gradient_norm", str(place)] for place in (1, 9, 11)] == pytest.approx(
        [32 * math.sqrt(3), 2 * math.sqrt(3), math.sqrt(3)]
    )


def test_a_rate_takes_two_activations():
    with pytest.raises(ValueError, match="1 activations of Sequential have a gradient; a rate takes 2"):
        explosion_rate(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.randn(3, 2))


# what the papers found


def deep(depth, width, norm):
    """Linear layers without skips, as drawn by He et al."""
    layers = []
    for _ in range(depth):
        linear = nn.Linear(width, width, bias=False)
        nn.init.kaiming_normal_(linear.weight)
        layers += [linear, *([norm(width)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers)


class Skip(nn.Module):
    def __init__(self, branch):
        super().__init__()
        self.branch = branch

    def forward(self, x):
        return x + self.branch(x)


def rate(model, batch, width):
    return values(explosion_rate(model, torch.randn(batch, width)))["explosion_rate", ""]


def test_batch_norm_without_skips_makes_gradients_explode_at_initialisation():
    """Yang et al. 2019: pi / (pi - 1) = 1.467 per layer for large batches, more for small ones."""
    torch.manual_seed(0)
    assert rate(deep(30, 256, nk.BatchNorm1d), 128, 256) == pytest.approx(1.463, rel=0.03)
    assert rate(deep(30, 256, None), 128, 256) == pytest.approx(1.0, abs=0.05)
    assert rate(deep(30, 256, nn.LayerNorm), 128, 256) == pytest.approx(1.0, abs=0.05)


def test_batch_norm_with_skips_does_not():
    torch.manual_seed(0)
    blocks = [Skip(deep(1, 256, nk.BatchNorm1d)) for _ in range(30)]
    assert rate(nn.Sequential(*blocks), 128, 256) < 1.1


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "published"), [(4, 2.95), (8, 1.80), (32, 1.52), (128, 1.463), (256, 1.449)])
def test_the_explosion_rate_by_batch_size(batch, published):
    """Width 512, 50 layers, mean of 6 seeds; the rate of batches of 4 spreads by 0.2 from seed to seed."""
    rates = []
    for seed in range(6):
        torch.manual_seed(seed)
        rates.append(rate(deep(50, 512, nn.BatchNorm1d), batch, 512))
    assert sum(rates) / 6 == pytest.approx(published, rel=0.08 if batch == 4 else 0.02)


def stable_rank(norm):
    torch.manual_seed(0)
    x = math.sqrt(0.8) * torch.randn(1, 256) + math.sqrt(0.2) * torch.randn(64, 256)  # cosines of 0.8
    model = deep(60, 256, norm)
    return values(measure(model, x, quantities=["stable_rank"]))["stable_rank", str(len(model) - 1)]


def test_batch_norm_keeps_the_rank_that_layer_norm_loses():
    """Daneshmand et al. 2020. 3.09 and 1.01 after 60 layers of ReLU."""
    assert stable_rank(nk.BatchNorm1d) == pytest.approx(3.09, rel=0.1)
    assert stable_rank(nk.LayerNorm) == pytest.approx(1.01, abs=0.02)
    assert stable_rank(None) == pytest.approx(1.01, abs=0.02)


SCALE_FREE = {
    "linear": lambda: (nn.Linear(6, 8), nk.BatchNorm1d(8, eps=1e-12), (32, 6)),
    "torch": lambda: (nn.Linear(6, 8), nn.BatchNorm1d(8, eps=1e-12), (32, 6)),
    "conv": lambda: (nn.Conv2d(3, 8, 3), nk.BatchNorm2d(8, eps=1e-12), (6, 3, 7, 7)),
    "group norm": lambda: (nn.Conv2d(3, 8, 3, bias=False), nk.GroupNorm(2, 8, eps=1e-12), (6, 3, 7, 7)),
    "layer norm": lambda: (nn.Linear(6, 8, bias=False), nk.LayerNorm(8, eps=1e-12), (32, 6)),
    "rms norm": lambda: (nn.Linear(6, 8, bias=False), nk.RMSNorm(8, eps=1e-12), (32, 6)),
    "instance norm": lambda: (nn.Conv2d(3, 8, 3, bias=False), nk.InstanceNorm2d(8, eps=1e-12), (6, 3, 7, 7)),
}


def along(name):
    """|cosine| of gradient and weight, of the layer before a norm and of one that no norm follows; all readings."""
    torch.manual_seed(0)
    layer, norm, shape = SCALE_FREE[name]()
    model = nn.Sequential(layer, norm, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double()
    x = torch.randn(shape, dtype=torch.float64)
    model(x)
    batch = x, torch.randint(0, 3, (len(x),))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = values(measure(model, batch, loss_fn=F.cross_entropy, optimizer=optimizer))
    return found["gradient_along_weight", "0.weight"], found["gradient_along_weight", "4.weight"], found


@pytest.mark.parametrize("name", SCALE_FREE)
def test_the_gradient_of_a_weight_before_a_norm_is_orthogonal_to_it(name):
    before_norm, elsewhere, found = along(name)
    assert before_norm < 1e-6
    assert elsewhere > 1e-3  # a weight whose scale matters
    assert ("effective_learning_rate", "0.weight") in found
    assert ("effective_learning_rate", "4.weight") not in found


def test_gradient_and_weight_of_a_scale_free_weight_trade_places():
    """Ten times the weight, a tenth of the gradient: the effective learning rate falls by a hundred."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nk.BatchNorm1d(8, eps=1e-12), nn.Tanh(), nn.Linear(8, 3)).double()
    batch = torch.randn(32, 6, dtype=torch.float64), torch.randint(0, 3, (32,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = values(measure(model, batch, loss_fn=F.cross_entropy, optimizer=optimizer))
    with torch.no_grad():
        model[0].weight *= 10
    after = values(measure(model, batch, loss_fn=F.cross_entropy, optimizer=optimizer))
    for quantity, factor in (("gradient_norm", 0.1), ("effective_learning_rate", 0.01)):
        assert after[quantity, "0.weight"] == pytest.approx(factor * before[quantity, "0.weight"], rel=1e-6)


def test_the_record_in_the_docs_says_what_the_papers_say():
    record = json.loads((Path(__file__).parent.parent / "records" / "doctor" / "theory.json").read_text())
    for row in record["growth"]:
        if "before" in row:
            assert row["mean"] == pytest.approx(row["before"], rel=0.08 if row["batch"] == 4 else 0.02)
        else:
            assert row["mean"] < 1.1
    assert record["stable_rank"]["batch norm"] > 2.7
    assert max(record["stable_rank"]["layer norm"], record["stable_rank"]["no norm"]) < 1.03
    assert {*record["gradient_along_weight"]} == {*SCALE_FREE}
    assert max(record["gradient_along_weight"].values()) < 1e-6
