"""nk.convert_: another kind of norm in the same object, with what the old one has learnt."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import normkit as nk
from normkit.surgery.target import groups

KINDS = {
    "group:2": nk.GroupNorm,
    "layer": nk.LayerNorm,
    "rms": nk.RMSNorm,
    "instance": nk.InstanceNorm2d,
    "batch": nk.BatchNorm2d,
    "dyt": nk.DyT,
    "none": nk.Identity,
}
SOURCES = {
    "torch batch": lambda: nn.BatchNorm2d(8),
    "batch": lambda: nk.BatchNorm2d(8),
    "torch group": lambda: nn.GroupNorm(4, 8),
    "instance": lambda: nk.InstanceNorm2d(8, affine=True),
    "layer": lambda: nk.LayerNorm(8, channels_first=True),
    "rms": lambda: nk.RMSNorm(8, channels_first=True),
    "dyt": lambda: nk.DyT(8, channels_first=True),
    "torch synchronised": lambda: nn.SyncBatchNorm(8),
}


def images(n: int = 12) -> Tensor:
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(3)) * 2 + 1


def around(norm: nn.Module) -> nn.Sequential:
    """A small model around a norm that has learnt something."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 4, 1))
    for name, tensor in norm.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + (0.5 if name in ("weight", "running_var", "alpha") else -0.2))
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_state(model: nn.Module, before: dict[str, Tensor]) -> None:
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Between all kinds.


@pytest.mark.parametrize("match", [False, True], ids=["carried", "matched"])
@pytest.mark.parametrize("to", KINDS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_kind_becomes_every_other(source, to, match):
    model = around(SOURCES[source]())
    layer, before = model[1], state(model)
    certificate = nk.convert_(model, to, match=images() if match else None)
    if certificate.refused:  # a layer for any number of axes becomes one for two only if somebody shows which
        assert (to in ("instance", "batch")) > match
        assert "give match=, a batch" in certificate.refused[0].reason
        return
    assert model[1] is layer
    if certificate.skipped:
        assert certificate.skipped[0].reason.startswith(f"it is {KINDS[to].__name__}(")
        return
    assert type(layer) is KINDS[to]
    with torch.no_grad():
        assert model.eval()(images()).shape == (12, 4, 4, 4)
        assert model.train()(images()).shape == (12, 4, 4, 4)
    again = nk.convert_(model, to, match=images() if match else None)
    assert again.changed == ()
    if "running_mean" not in layer.state_dict():  # a batch went through it since
        certificate.undo()
        assert_state(model, before)
        assert type(layer) is type(SOURCES[source]())


@pytest.mark.parametrize("to", ["group:2", "layer", "instance", "dyt"])
@pytest.mark.parametrize("source", ["torch batch", "batch"])
def test_weight_and_bias_are_carried_over_as_the_same_objects(source, to):
    model = around(SOURCES[source]())
    weight, bias = model[1].weight, model[1].bias
    values = weight.clone(), bias.clone()
    nk.convert_(model, to)
    assert model[1].weight is weight
    assert model[1].bias is bias
    assert torch.equal(weight, values[0])
    assert torch.equal(bias, values[1])


def test_the_numbers_are_those_of_a_layer_built_by_hand():
    model, x = around(nn.BatchNorm2d(8)), images()
    by_hand = nn.GroupNorm(2, 8, eps=model[1].eps)
    by_hand.load_state_dict({name: model[1].state_dict()[name] for name in ("weight", "bias")})
    wanted = nn.Sequential(model[0], by_hand, *model[2:])(x)
    nk.convert_(model, "group:2")
    torch.testing.assert_close(model(x), wanted)


def test_options_go_along():
    layer = nk.BatchNorm2d(8, eps=0.5, affine=False, activation="silu", dtype=torch.float64)
    nk.convert_(layer, "group:4")
    assert (layer.eps, layer.num_groups, layer.weight) == (0.5, 4, None)
    assert isinstance(layer.activation, nn.SiLU)
    layer = nn.BatchNorm2d(8, bias=False, dtype=torch.float64)
    nk.convert_(layer, ("group", {"num_groups": 2, "eps": 0.25}))
    assert (layer.eps, layer.num_groups, layer.bias, layer.weight.dtype) == (0.25, 2, None, torch.float64)
    layer = nn.BatchNorm1d(8).eval()
    layer._is_hf_initialized = True  # what others have put on the object
    nk.convert_(layer, "layer")
    assert layer.channels_first
    assert not layer.training
    assert layer._is_hf_initialized
    assert not hasattr(layer, "num_features")
    assert layer(torch.randn(2, 8)).shape == (2, 8)
    assert layer(torch.randn(2, 8, 5)).shape == (2, 8, 5)


def test_channels_on_the_last_axis_stay_there():
    model = nn.Sequential(nn.LayerNorm((3, 8)), nn.LayerNorm(8), nk.RMSNorm(8))
    nk.convert_(model, "dyt")
    assert [layer.normalized_shape for layer in model] == [(3, 8), (8,), (8,)]
    assert model(torch.randn(2, 3, 8)).shape == (2, 3, 8)
    certificate = nk.convert_(model, "group:2")
    assert certificate.changed == ()
    assert certificate.refused[0].reason == "its channels are the last axis, and group_norm takes them on axis 1"


def test_a_factory_of_anybodys_layers():
    model = around(nn.BatchNorm2d(8))
    nk.convert_(model, lambda channels: nn.GroupNorm(4, channels))
    assert type(model[1]) is nn.GroupNorm
    nk.convert_(model, nk.factory("group:8"))
    assert (type(model[1]), model[1].num_groups) == (nk.GroupNorm, 8)
    with pytest.raises(TypeError, match="to= returned a int; it has to return a layer"):
        nk.convert_(model, lambda channels: channels)


@pytest.mark.parametrize(
    ("channels", "wanted"), [(16, 1), (32, 2), (64, 4), (24, 2), (20, 1), (7, 1), (96, 6), (2048, 128)]
)
def test_auto_chooses_groups_of_about_sixteen_channels(channels, wanted):
    assert groups(channels) == wanted
    layer = nn.BatchNorm2d(channels)
    nk.convert_(layer, "group:auto")
    assert layer.num_groups == wanted


def test_torchs_layer_becomes_normkits_and_nothing_moves():
    model, x = around(nn.BatchNorm2d(8)), images()
    before = state(model)
    certificate = nk.convert_(model, "batch", match=x)
    assert [p.safety for p in certificate.changed] == ["identical"]
    assert [row.training for row in certificate.agreement] == [False, True]
    assert_state(model, before)


# Frozen batch norm.


def test_a_frozen_batch_norm_keeps_statistics_or_gets_them():
    model, x = around(nn.BatchNorm2d(8)), images()
    before, output = state(model), model.eval()(x)
    certificate = nk.convert_(model, "frozen_batch", match=x)
    assert [p.safety for p in certificate.changed] == ["eval_identical"]
    torch.testing.assert_close(model.train()(x), output)
    assert_state(model, before)
    group = around(nn.GroupNorm(4, 8))
    wanted = "it has no running statistics to be frozen; give match=, a batch, and it gets those"
    layer = nk.GroupNorm(4, 8)
    assert nk.plan(nk.convert_, nn.Sequential(layer), "frozen").refused[0].reason in (
        wanted,
        "batch_norm wants to know how many axes of space there are; give match=, a batch",
    )
    output = group(x)
    nk.convert_(group, "frozen_batch", match=x)
    seen = group[0](x[:6])  # the half that was fitted
    torch.testing.assert_close(group[1].running_mean, seen.mean((0, 2, 3)))
    torch.testing.assert_close(group[1].running_var, seen.var((0, 2, 3)))
    assert (group.train()(x) - output).std() < 0.5 * output.std()


# match=


def least_squares(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift of each channel, by torch's solver."""
    found = []
    for a, b in zip(z.movedim(1, 0).flatten(1).double(), y.movedim(1, 0).flatten(1).double(), strict=True):
        found.append(torch.linalg.lstsq(torch.stack([a, torch.ones_like(a)], 1), b[:, None]).solution[:, 0])
    return torch.stack(found)[:, 0].float(), torch.stack(found)[:, 1].float()


def test_scale_and_shift_are_those_of_least_squares():
    model, x = around(nn.BatchNorm2d(8)).eval(), images()
    with torch.no_grad():
        inner = model[0](x[:6])
        z, y = nn.functional.group_norm(inner, 2, eps=model[1].eps), model[1](inner)
    weight, bias = least_squares(z, y)
    nk.convert_(model, "group:2", match=x)
    torch.testing.assert_close(model[1].weight, weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model[1].bias, bias, rtol=1e-4, atol=1e-4)


def deep() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels in (3, 8, 8, 8):
        layers += [nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 36, 5))
    for _ in range(20):
        model(images(40) + torch.randn(40, 3, 1, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def test_a_layer_is_fitted_behind_the_fitted_ones_and_the_errors_are_those_of_other_data():
    model, x = deep(), images(40)
    original = copy.deepcopy(model)
    carried = copy.deepcopy(model)
    certificate = nk.convert_(model, "group:2", match=x)
    nk.convert_(carried, "group:2")
    with torch.no_grad():
        y, fitted, unfitted = (m(x[20:]) for m in (original, model, carried))
        fourth, now = original[:11](x[20:]), model[:11](x[20:])
    relative = lambda a, b: float((a - b).double().square().mean().sqrt() / b.double().std(correction=0))
    of = {(reading.quantity, reading.module): reading.value for reading in certificate.readings}
    assert of["match error", ""] == pytest.approx(relative(fitted, y), rel=1e-3)
    assert of["match error", "10"] == pytest.approx(relative(now, fourth), rel=1e-3)
    assert relative(fitted, y) < 0.6 * relative(unfitted, y)
    with torch.no_grad():  # fitted to what the converted layers before it give, and not to what the old ones gave
        z, y = nn.functional.group_norm(model[:10](x[:20]), 2), original[:11](x[:20])
    weight, bias = least_squares(z, y)
    torch.testing.assert_close(model[10].weight, weight, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model[10].bias, bias, rtol=1e-3, atol=1e-3)


def test_two_batches_of_a_loader():
    model, x = around(nn.BatchNorm2d(8)).eval(), images()
    by_halves = copy.deepcopy(model)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(12)), batch_size=6)
    first = nk.convert_(model, "group:2", match=loader)
    second = nk.convert_(by_halves, "group:2", match=x)
    assert torch.equal(model[1].weight, by_halves[1].weight)
    assert [r.value for r in first.readings] == [r.value for r in second.readings]


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = around(nn.BatchNorm2d(8))

    def forward(self, pixels: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        return {"logits": self.body(pixels) * scale}


def test_batches_by_name_and_by_call():
    wanted = around(nn.BatchNorm2d(8))
    nk.convert_(wanted, "group:2", match=images())
    ways: list[dict[str, Any]] = [
        {"match": {"pixels": images(), "scale": 2.0}},
        {"match": (images(), 2.0)},
        {"match": [{"pixels": half, "label": 0} for half in images().chunk(2)]},
        {"match": images(), "call": lambda model, batch: model(batch, scale=3.0)},
    ]
    for options in ways:
        model = Named()
        nk.convert_(model, "group:2", **options)
        assert torch.equal(model.body[1].weight, wanted[1].weight)


@pytest.mark.parametrize("to", ["group:2", "layer", "dyt"])
def test_low_precision_and_channels_last(to):
    reference, x = around(nn.BatchNorm2d(8)), images()
    nk.convert_(reference, to, match=x)
    narrow = around(nn.BatchNorm2d(8)).bfloat16()
    nk.convert_(narrow, to, match=x.bfloat16())
    assert narrow[1].weight.dtype == torch.bfloat16
    torch.testing.assert_close(narrow[1].weight.float(), reference[1].weight, rtol=0.1, atol=0.1)
    last = around(nn.BatchNorm2d(8)).to(memory_format=torch.channels_last)
    nk.convert_(last, to, match=x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last[1].weight, reference[1].weight, rtol=1e-3, atol=1e-3)
    assert last(x.contiguous(memory_format=torch.channels_last)).shape == (12, 4, 4, 4)


def test_a_residual_and_an_activation_in_the_norm_are_not_fitted_away():
    class Block(nn.Module):
        def __init__(self, norm: nn.Module, fused: bool) -> None:
            super().__init__()
            self.norm, self.fused = norm, fused

        def forward(self, x: Tensor) -> Tensor:
            y = x.roll(1, 0) * 5
            return self.norm(x, residual=y) if self.fused else torch.relu(self.norm(x) + y)

    x = torch.randn(12, 8, 5, 5) * 3 + 1
    plain, fused = nn.BatchNorm2d(8), nk.BatchNorm2d(8, activation="relu")
    for norm in (plain, fused):
        norm.running_mean.fill_(0.7)
    blocks = Block(plain, False), Block(fused, True)
    for block in blocks:
        nk.convert_(block, "group:2", match=x)
    torch.testing.assert_close(fused.weight, plain.weight)
    torch.testing.assert_close(blocks[1](x), blocks[0](x))


def test_layers_that_share_a_weight_are_carried_and_a_layer_called_twice_fits_both_calls():
    model = nn.Sequential(around(nn.BatchNorm2d(8)), nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8))
    model[2].weight = model[0][1].weight
    before = model[2].weight.clone()
    nk.convert_(model, "group:2", match=images())
    assert model[2].weight is model[0][1].weight
    assert torch.equal(model[2].weight, before)

    norm = nn.BatchNorm1d(4).eval()
    norm.running_mean.fill_(1.0)
    twice = lambda layer, x: (layer(x[:, 0]), layer(x[:, 1] * 3))
    x = torch.randn(20, 2, 4)
    original = copy.deepcopy(norm)
    nk.convert_(norm, "group:2", match=x, call=lambda m, batch: twice(m, batch))
    with torch.no_grad():
        y = torch.cat(twice(original, x[:10]))
        z = torch.cat(twice(lambda t: nn.functional.group_norm(t, 2), x[:10]))
    weight, bias = least_squares(z, y)
    torch.testing.assert_close(norm.weight, weight, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(norm.bias, bias, rtol=1e-3, atol=1e-3)


def test_match_that_cannot_be_is_said():
    model = around(nn.BatchNorm2d(8))
    with pytest.raises(ValueError, match="match= has 1 samples, and it is cut in two"):
        nk.convert_(model, "group:2", match=images(1))
    with pytest.raises(ValueError, match=r"(?s)the model raises TypeError on match=.*a tuple of the positional"):
        nk.convert_(model, "group:2", match=(images(), torch.zeros(12)))
    assert nk.convert_(nn.Linear(2, 2), "group:2").notes == ("there is no norm of torch's or normkit's in the model",)
    with pytest.raises(ValueError, match="match= has 1 batches, and it takes two"):
        nk.convert_(model, "group:2", match=[images(1)])


def test_a_dead_channel_is_no_division_by_zero():
    model = around(nn.BatchNorm2d(8))
    with torch.no_grad():
        model[0].weight[2] = 0
    nk.convert_(model, "instance", match=images())
    assert all(parameter.isfinite().all() for parameter in model.parameters())


# Layer norm as RMS norm.


def between(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 8), nn.LayerNorm(8, bias=bias), nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 2)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("bias", [True, False])
def test_layer_becomes_rms_exactly_where_its_neighbours_can_help(bias):
    model, x = between(bias), torch.randn(16, 5) * 3 + 1
    before, wanted = state(model), model(x)
    certificate = nk.convert_(model, "rms", match=x)
    assert {type(model[1]), type(model[3])} == {nk.RMSNorm}
    assert {p.safety for p in certificate.changed} == {"identical"}
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)
    assert model[0](x).mean(1).abs().max() < 1e-5
    certificate.undo()
    assert_state(model, before)


def test_convolutions_take_the_mean_out_too():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3, groups=1), nk.LayerNorm(8, bias=False, channels_first=True)), images()
    wanted = model(x)
    certificate = nk.convert_(model, "rms", match=x)
    assert {p.safety for p in certificate.changed} == {"identical"}
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(self.norm(y)) + y


def spoil(change: str) -> nn.Module:
    model = between()
    if change == "activation":
        model[0] = nn.Sequential(nn.Linear(5, 8), nn.ReLU())
        return nn.Sequential(model[0][0], model[0][1], *model[1:])
    if change == "parametrized":
        weight_norm(model[0])
    elif change == "hook":
        model[0].register_forward_hook(lambda *_: None)
    elif change == "no bias behind":
        model[2].bias = None
    elif change == "called twice":
        model = nn.Sequential(*model[:2], model[0] if False else nn.Linear(8, 5), model[0], *model[1:2])
    elif change == "branches":

        class Branching(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) if x.sum() > 0 else x

        return Branching(*model)
    return model


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("activation", "cannot take the mean out: it is ReLU"),
        ("parametrized", "cannot take the mean out: it has hooks or parametrizations"),
        ("hook", "cannot take the mean out: it has hooks or parametrizations"),
        ("no bias behind", "its bias has nowhere to go: 2 has none"),
        ("called twice", "it is not called once, with its input alone"),
        ("branches", "what comes before and behind it is not known: TraceError"),
    ],
)
def test_where_it_is_not_exact_the_certificate_says_why(change, sentence):
    certificate = nk.plan(nk.convert_, spoil(change), "rms")
    assert sentence in next(p.detail for p in certificate.changed if "RMSNorm" in p.action)


def test_other_readers_need_the_mean():
    certificate = nk.plan(nk.convert_, Reading(), "rms")
    assert "first has other readers, who need its mean; loses its bias" in certificate.changed[0].detail


# Refusals.


class Loud(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 100


class Foreign2dNorm(nn.Module):
    pass


def test_what_is_refused_is_named_with_its_reason():
    replaced, parametrized = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
    replaced.forward = lambda x: x
    nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Softplus())
    model = nn.ModuleDict(
        {
            "subclass": Loud(8),
            "replaced": replaced,
            "parametrized": parametrized,
            "lazy": nn.LazyBatchNorm2d(),
            "response": nn.LocalResponseNorm(2),
            "indivisible": nn.BatchNorm2d(9),
            "fine": nn.BatchNorm2d(8),
            "left": nn.BatchNorm2d(8),
            "foreign": Foreign2dNorm(),
        }
    )
    certificate = nk.convert_(model, "group:4", filter_fn=lambda module, name: name != "left")
    refused = {row.module: row.reason for row in certificate.refused}
    assert refused["subclass"].endswith("Loud is a subclass of BatchNorm2d and may compute something else")
    assert refused["replaced"] == "its forward has been replaced on the object"
    assert "remove_parametrizations first" in refused["parametrized"]
    assert refused["lazy"] == "its size is not known yet; run one batch through the model first"
    assert "pools over neighbouring channels" in refused["response"]
    assert "num_channels (9) must be divisible by num_groups (4)" in refused["indivisible"]
    assert [row.module for row in certificate.changed] == ["fine"]
    skipped = {row.module: row.reason for row in certificate.skipped}
    assert skipped["left"] == "filter_fn left it out"
    assert skipped["foreign"].endswith("Foreign2dNorm is no norm of torch's or normkit's")


def test_an_activation_that_would_be_lost_is_refused():
    layer = nk.BatchNorm2d(8, activation="relu")
    certificate = nk.convert_(nn.Sequential(layer), lambda channels: nn.GroupNorm(2, channels))
    assert certificate.refused[0].reason == "it activates by ReLU(), which GroupNorm of the new kind does not"


def test_wrappers_and_names_that_are_none():
    model = around(nn.BatchNorm2d(8))
    with pytest.raises(TypeError, match="convert_: the model is compiled already; nothing was changed"):
        nk.convert_(torch.compile(model, backend="eager"), "group:2")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(TypeError, match=r"(?s)wrapped in DistributedDataParallel.*convert the model before"):
            nk.convert_(nn.parallel.DistributedDataParallel(model), "group:2")
    finally:
        dist.destroy_process_group()
    with pytest.raises(ValueError, match="there is no norm named 'groop'"):
        nk.convert_(model, "groop:2")
    with pytest.raises(TypeError, match="has no option 'colour'"):
        nk.convert_(model, ("group", {"num_groups": 2, "colour": 1}))
    assert type(model[1]) is nn.BatchNorm2d


# The optimizer.


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(images()).square().mean().backward()
    optimizer.step()


def grouped(model: nn.Module) -> torch.optim.Optimizer:
    norms = [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    rest = [p for p in model.parameters() if all(p is not q for q in norms)]
    return torch.optim.AdamW([{"params": rest, "lr": 0.1}, {"params": norms, "lr": 0.01, "weight_decay": 0.0}])


def test_the_optimizer_follows():
    model = around(nn.BatchNorm2d(8))
    optimizer = grouped(model)
    train(model, optimizer)
    weight, bias = model[1].weight, model[1].bias
    moments = {p: {k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters()}
    lists = [list(group["params"]) for group in optimizer.param_groups]
    dyt = nk.convert_(model, "dyt", optimizer=optimizer)
    assert [p is q for p, q in zip(optimizer.param_groups[1]["params"], (weight, bias, model[1].alpha), strict=True)]
    assert optimizer.param_groups[1]["lr"] == 0.01
    assert all(torch.equal(optimizer.state[p]["exp_avg"], m["exp_avg"]) for p, m in moments.items())
    before = model[1].alpha.clone()
    train(model, optimizer)
    assert not torch.equal(model[1].alpha, before)
    dyt.undo()
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == [list(map(id, p)) for p in lists]
    assert len(optimizer.state) == len(lists[0]) + len(lists[1])
    rms = nk.convert_(model, "rms", optimizer=optimizer)
    assert optimizer.param_groups[1]["params"] == [weight]
    assert bias not in optimizer.state
    assert "optimizer follows: 0 parameters join, 1 leave" in repr(rms)
    train(model, optimizer)
    rms.undo()
    assert bias in optimizer.state
    train(model, optimizer)


def test_an_optimizer_that_knows_names():
    model = around(nn.BatchNorm2d(8))
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    nk.convert_(model, "dyt", optimizer=optimizer)
    (group,) = optimizer.param_groups
    assert group["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias", "1.alpha"]
    nk.convert_(model, "rms", optimizer=optimizer)
    assert group["param_names"] == ["0.weight", "0.bias", "1.weight", "3.weight", "3.bias"]
    assert len(group["params"]) == 5


def test_without_an_optimizer_the_certificate_reminds():
    certificate = nk.convert_(around(nn.BatchNorm2d(8)), "dyt")
    assert "1 parameters join, 0 leave: give optimizer=, or make the optimizer afterwards" in certificate.notes


def test_undo_refuses_what_has_been_changed_since():
    model = around(nn.BatchNorm2d(8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    certificate = nk.convert_(model, "dyt", match=images(), optimizer=optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(RuntimeError, match="the optimizer's groups have been changed since"):
        certificate.undo()
    del optimizer.param_groups[1]
    train(model, optimizer)
    with pytest.raises(RuntimeError, match="1: its weight or bias has moved since"):
        certificate.undo()
    assert type(model[1]) is nk.DyT
