"""Conditional and adaptive norms: what the formulas say in float64, and what every layer of normkit can do."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normkit as nk

EPS = 1e-5


def standardised(x, axes):
    """The formula, in whatever precision x has."""
    centred = x - x.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True) + EPS).sqrt()


def as_channels(vector, x):
    return vector.view(*vector.shape, *[1] * (x.dim() - 2))


def by_condition(layer, x, condition, axes):
    """De Vries et al.: one sample after the other."""
    table = layer.offsets.map
    rows = []
    for sample, z in zip(standardised(x, axes), condition, strict=True):
        offsets = table.weight[z] if isinstance(table, nn.Embedding) else table.weight @ z + table.bias
        scale, shift = offsets.chunk(2)
        wide = lambda v, s=sample: v.view(-1, *[1] * (s.dim() - 1))
        rows.append(wide(layer.weight + scale) * sample + wide(layer.bias + shift))
    return torch.stack(rows)


def adaptive_layer(layer, x, condition):
    offsets = F.linear(condition, layer.modulation.map.weight, layer.modulation.map.bias)
    scale, shift, gate = (part[:, None] for part in offsets.chunk(3, -1))
    return (1 + scale) * standardised(x, -1) + shift, gate


def adaptive_instance(layer, x, style):
    axes = tuple(range(2, style.dim()))
    mean = style.mean(axes)
    deviation = (style.var(axes, correction=0) + EPS).sqrt()
    return as_channels(deviation, x) * standardised(x, tuple(range(2, x.dim()))) + as_channels(mean, x)


def spade(layer, x, layout):
    rows = torch.arange(x.shape[2]) * layout.shape[2] // x.shape[2]
    columns = torch.arange(x.shape[3]) * layout.shape[3] // x.shape[3]
    small = layout[:, :, rows][:, :, :, columns]
    hidden = F.conv2d(small, layer.shared.weight, layer.shared.bias, padding=1).clamp(min=0)
    maps = F.conv2d(hidden, layer.modulation.weight, layer.modulation.bias, padding=1)
    scale, shift = maps[:, : x.shape[1]], maps[:, x.shape[1] :]
    return (1 + scale) * standardised(x, (0, 2, 3)) + shift


CLASSES = torch.tensor([2, 0, 1, 2, 2, 0])
IMAGES, ROWS, TOKENS = (6, 8, 5, 4), (6, 8), (6, 7, 8)
CASES = {  # the layer, the shape of its input, its condition, the formula
    "batch of classes": (
        lambda: nk.ConditionalBatchNorm2d(8, num_classes=3),
        IMAGES,
        lambda: CLASSES,
        lambda layer, x, z: by_condition(layer, x, z, (0, 2, 3)),
    ),
    "batch of features": (
        lambda: nk.ConditionalBatchNorm1d(8, condition_features=5),
        ROWS,
        lambda: torch.randn(6, 5),
        lambda layer, x, z: by_condition(layer, x, z, (0,)),
    ),
    "batch of sequences": (
        lambda: nk.ConditionalBatchNorm1d(8, num_classes=3),
        (6, 8, 7),
        lambda: CLASSES,
        lambda layer, x, z: by_condition(layer, x, z, (0, 2)),
    ),
    "instance": (
        lambda: nk.ConditionalInstanceNorm2d(8, condition_features=5),
        IMAGES,
        lambda: torch.randn(6, 5),
        lambda layer, x, z: by_condition(layer, x, z, (2, 3)),
    ),
    "adaptive layer": (
        lambda: nk.AdaptiveLayerNorm(8, condition_features=5),
        TOKENS,
        lambda: torch.randn(6, 5),
        adaptive_layer,
    ),
    "adaptive instance": (
        nk.AdaptiveInstanceNorm,
        IMAGES,
        lambda: 3 + 2 * torch.randn(6, 8, 3, 9),
        adaptive_instance,
    ),
    "spade": (
        lambda: nk.SPADE(8, layout_channels=3, hidden=4),
        IMAGES,
        lambda: torch.randn(6, 3, 10, 12),
        spade,
    ),
}
LEARNED = {name: case for name, case in CASES.items() if name != "adaptive instance"}
OF_BATCHES = [name for name in CASES if "batch" in name or name == "spade"]


def drawn(layer: nn.Module) -> nn.Module:
    """The layer with parameters that are not what they start as."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def tensors(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def made(name):
    torch.manual_seed(0)
    build, shape, condition, formula = CASES[name]
    return drawn(build()), 2 + 3 * torch.randn(shape), condition(), formula


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_all_gradients_are_those_of_the_formula(name, dtype):
    layer, x, condition, formula = made(name)
    exact = copy.deepcopy(layer).double()
    leaf = lambda t, kind: t.to(kind, copy=True).requires_grad_()
    own, same = leaf(x, dtype), leaf(x, torch.float64)
    of_floats = condition.is_floating_point()
    z = leaf(condition, dtype) if of_floats else condition
    same_z = leaf(condition, torch.float64) if of_floats else condition
    got, wanted = tensors(layer.to(dtype)(own, z)), tensors(formula(exact, same, same_z))
    weights = [torch.randn(w.shape, dtype=torch.float64) for w in wanted]
    sum((g * w.to(dtype)).sum() for g, w in zip(got, weights, strict=True)).backward()
    sum((g * w).sum() for g, w in zip(wanted, weights, strict=True)).backward()
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, **close)
    torch.testing.assert_close(own.grad.double(), same.grad, **close)
    if of_floats:
        torch.testing.assert_close(z.grad.double(), same_z.grad, **close)
    for (key, parameter), other in zip(layer.named_parameters(), exact.parameters(), strict=True):
        assert parameter.grad.abs().sum() > 0, key
        torch.testing.assert_close(parameter.grad.double(), other.grad, **close)


@pytest.mark.parametrize("name", LEARNED)
def test_they_start_as_the_plain_norm_and_the_condition_learns(name):
    torch.manual_seed(0)
    build, shape, condition, _ = CASES[name]
    layer, x, z = build(), torch.randn(shape), condition()
    if name == "spade":  # its convolutions start as torch's do
        return
    y, *gate = tensors(layer(x, z))
    assert torch.allclose(y, layer.norm(x), atol=1e-6)
    assert not any(g.any() for g in gate)
    (y.square().sum() + sum(g.sum() for g in gate) + y.sum()).backward()
    maps = layer.modulation if hasattr(layer, "modulation") else layer.offsets
    assert maps.map.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", OF_BATCHES)
def test_evaluation_uses_the_running_statistics_which_move_in_training_alone(name):
    layer, x, z, _ = made(name)
    layer(x, z)
    mean = layer.norm.running_mean.clone()
    assert mean.abs().min() > 0
    layer.eval()
    alone = layer(x[:1], z[:1])
    assert torch.allclose(alone, layer(x, z)[:1], atol=1e-5)
    assert layer.norm.running_mean.equal(mean)


@pytest.mark.parametrize("name", CASES)
def test_padding_changes_nothing_and_gives_zeros(name):
    layer, x, z, _ = made(name)
    more = z
    if x.dim() == 2:
        padded, mask = torch.cat([x, torch.full((2, 8), float("nan"))]), torch.arange(8) < 6
        more, part = torch.cat([z, z[:2]]), slice(None, 6)
    else:
        axis = 1 if name == "adaptive layer" else x.dim() - 1
        filling = torch.full([3 if i == axis else size for i, size in enumerate(x.shape)], float("nan"))
        padded = torch.cat([x, filling], axis)
        places = (6, *(size for i, size in enumerate(padded.shape) if i and i != (2 if axis == 1 else 1)))
        mask = (torch.arange(padded.shape[axis]) < x.shape[axis]).expand(places)
        part = tuple(slice(None, size) for size in x.shape)
    if name == "spade":
        nn.init.zeros_(layer.modulation.weight)  # or its convolutions would see another border
    wanted, got = tensors(layer(x, z))[0], tensors(layer(padded, more, mask=mask))[0]
    assert torch.allclose(got[part], wanted, atol=1e-5)
    assert got.isfinite().all()
    assert got.sum().isclose(got[part].sum(), atol=1e-3)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][1] == IMAGES])
def test_channels_last_stays_channels_last_with_the_same_values(name):
    layer, x, z, _ = made(name)
    y = layer(x.contiguous(memory_format=torch.channels_last), z)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(y, layer(x, z), atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_autocast_to_bfloat16(name):
    layer, x, z, _ = made(name)
    wanted = tensors(layer(x, z))[0]
    for given in (x, x.bfloat16()):
        given.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y, *rest = tensors(layer(given, z))
        assert y.dtype == given.dtype
        assert (y - wanted).abs().max() < 0.05 * wanted.abs().max()
        (y.float().square().sum() + sum(r.float().sum() for r in rest)).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("name", LEARNED)
def test_they_save_and_load(name, tmp_path):
    layer, x, z, _ = made(name)
    layer(x, z)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = CASES[name][0]()
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    for one, two in zip(tensors(layer.eval()(x, z)), tensors(other.eval()(x, z)), strict=True):
        assert one.equal(two)


@pytest.mark.parametrize("name", CASES)
def test_they_compile_whole(name):
    torch._dynamo.reset()
    layer, x, z, _ = made(name)
    wanted = tensors(copy.deepcopy(layer)(x, z))
    for one, two in zip(tensors(torch.compile(layer, fullgraph=True, backend="eager")(x, z)), wanted, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when Inductor is loaded
@pytest.mark.parametrize("name", CASES)
def test_they_compile_whole_by_inductor(name):
    torch._dynamo.reset()
    layer, x, z, _ = made(name)
    wanted = tensors(copy.deepcopy(layer)(x, z))
    for one, two in zip(tensors(torch.compile(layer, fullgraph=True)(x, z)), wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


class Conditioned(nn.Module):
    """A convolution and a conditional norm: what an operation gets as a model."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3)
        self.norm = nk.ConditionalBatchNorm2d(8, num_classes=3)

    def forward(self, x, z):
        return self.norm(self.convolution(x), z)


def test_freezing_stops_the_statistics_and_with_affine_what_the_condition_learns():
    model, x = Conditioned(), torch.randn(6, 3, 6, 6)
    learned = ("weight", "bias", "offsets.map.weight")
    trains = lambda: [model.norm.get_parameter(name).requires_grad for name in learned]
    statistics = nk.freeze_(model, affine=False)
    model.train()(x, CLASSES).sum().backward()
    assert (model.norm.norm.running_mean.any().item(), trains()) == (False, [True] * 3)
    assert model.norm.offsets.map.weight.grad is not None
    certificate = nk.freeze_(model)
    assert (trains(), model.norm.offsets.map.weight.grad) == ([False] * 3, None)
    assert [(row.module, row.detail) for row in certificate.changed] == [("norm", ", ".join(learned))]
    again = nk.freeze_(model)
    assert not again.changed
    certificate.undo()
    assert trains() == [True] * 3
    model.norm.bias.requires_grad = False
    nk.freeze_(model)
    model = pickle.loads(pickle.dumps(model))
    nk.unfreeze_(model)
    assert trains() == [True, False, True]
    assert (statistics.operation, model.norm.norm.frozen) == ("freeze_", False)


def test_freezing_a_part_leaves_the_others():
    model = nn.ModuleDict({"a": nk.SPADE(4, 2, 3), "b": nk.SPADE(4, 2, 3), "c": nk.ConditionalInstanceNorm2d(4, 3)})
    nk.freeze_(model, filter_fn=lambda module, name: name.startswith("a."))
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        f"a.{layer}.{own}" for layer in ("shared", "modulation") for own in ("weight", "bias")
    }


def test_converting_puts_another_norm_inside():
    model, x = Conditioned(), torch.randn(6, 3, 6, 6)
    drawn(model.norm)
    nk.convert_(model, "group:2")
    assert isinstance(model.norm.norm, nk.GroupNorm)
    inside = standardised(model.convolution(x).view(6, 2, -1), -1).view(6, 8, 4, 4)
    z = model.norm.offsets.map.weight[CLASSES]
    wanted = inside * as_channels(model.norm.weight + z[:, :8], inside)
    wanted = wanted + as_channels(model.norm.bias + z[:, 8:], inside)
    assert torch.allclose(model(x, CLASSES), wanted, atol=1e-4)


def test_any_policy_of_statistics_may_be_inside():
    norm, x = nk.ConditionalBatchNorm2d(8, num_classes=3, statistics="ghost:3"), torch.randn(IMAGES)
    halves = torch.cat([standardised(part, (0, 2, 3)) for part in x.split(3)])
    assert torch.allclose(norm(x, CLASSES), halves, atol=1e-5)


def test_spade_takes_other_norms():
    torch.manual_seed(0)
    layer, x, flat = nk.SPADE(8, 3, 4, norm="instance"), torch.randn(IMAGES), torch.zeros(6, 3, 2, 2)
    with torch.no_grad():
        layer.modulation.bias.zero_()
        layer.shared.bias.zero_()
    assert torch.allclose(layer(x, flat), standardised(x, (2, 3)), atol=1e-5)
    with pytest.raises(TypeError, match="affine"):
        nk.SPADE(8, 3, norm="layer")


@pytest.mark.parametrize("both", [{}, {"num_classes": 3, "condition_features": 4}, {"num_classes": 0}])
def test_one_kind_of_condition_is_asked_for(both):
    with pytest.raises(ValueError, match=r"ConditionalBatchNorm2d: num_classes=.*\n.*give one of them"):
        nk.ConditionalBatchNorm2d(8, **both)


@pytest.mark.parametrize("own", ["affine", "bias", "activation"])
def test_options_that_the_condition_replaces_are_refused(own):
    with pytest.raises(TypeError, match=f"{own}=None belongs to the norm inside"):
        nk.ConditionalBatchNorm1d(8, num_classes=3, **{own: None})


@pytest.mark.parametrize(
    "condition", [torch.zeros(5, dtype=torch.long), torch.zeros(6, 1, dtype=torch.long), torch.zeros(6)], ids=str
)
def test_conditions_that_do_not_fit_are_refused(condition):
    with pytest.raises(ValueError, match=r"beside 6 samples.\n  give one condition per sample: \(6,\) of int64"):
        nk.ConditionalBatchNorm1d(8, num_classes=3)(torch.randn(6, 8), condition)


def test_styles_and_layouts_that_do_not_fit_are_refused():
    x = torch.randn(IMAGES)
    with pytest.raises(ValueError, match="as many samples"):
        nk.AdaptiveInstanceNorm()(x, torch.randn(6, 4, 5, 5))
    with pytest.raises(ValueError, match=r"give a layout \(6, 3, a, b\)"):
        nk.SPADE(8, 3)(x, torch.randn(6, 2, 5, 5))


def test_one_condition_for_each_token():
    layer = drawn(nk.AdaptiveLayerNorm(8, condition_features=5, gate=False))
    x, z = torch.randn(TOKENS), torch.randn(6, 7, 5)
    assert torch.allclose(layer(x, z)[:, 3], layer(x[:, 3:4], z[:, 3])[:, 0], atol=1e-5)
