"""Layers by name: the names people type, what an unknown one is answered, and a model written for ``norm_layer=``."""

from __future__ import annotations

import copy
import functools
import pickle
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import normkit as nk
from normkit.vocabulary.spec import REGISTRY
from twins import off_scale

CHANNELS = 12
OPTIONS = {"group_norm": {"num_groups": 4}}
"""What a norm cannot do without at a number of channels that its default does not divide."""

TYPED = {
    nk.BatchNorm2d: (
        "batch",
        "bn",
        "BN",
        "BN2d",
        "batch_norm",
        "BatchNorm",
        "batchnorm2d",
        "Batch-Norm",
        "BATCH_NORM_2D",
    ),
    nk.LayerNorm: ("layer", "ln", "LN", "layer_norm", "LayerNorm", "layernorm2d"),
    nk.RMSNorm: ("rms", "RMS", "rms_norm", "RMSNorm", "rmsnorm2d"),
    nk.InstanceNorm2d: ("instance", "in", "IN", "IN2d", "instance_norm", "InstanceNorm2d"),
    nk.GroupNorm: ("group:4", "gn:4", "GN:4", "group_norm:4", "GroupNorm:4", "Group:4"),
    nk.DyT: ("dyt", "DyT", "dynamic_tanh", "DynamicTanh"),
    nk.Derf: ("derf", "Derf", "dynamic_erf"),
    nk.SwitchableNorm: ("switchable", "switchable_norm", "SwitchableNorm2d"),
    nk.FilterResponseNorm: ("frn", "frn:tlu", "FRN", "filter_response_norm", "filter-response"),
    nk.PowerNorm: ("power", "power:100", "PowerNorm", "power_norm"),
    nk.EvoNormB0: ("evonorm_b0", "EvoNorm-B0", "evonormb0"),
    nk.EvoNormS0: ("evonorm_s0", "evonorm-s0:4", "EvoNormS0"),
    nk.GlobalResponseNorm: ("grn", "GRN", "global_response_norm"),
    nk.Identity: ("none", "None", "identity", "Identity", "", None),
}


def small(name: str) -> dict[str, object]:
    return OPTIONS.get(name, {})


@pytest.mark.parametrize(("cls", "name"), [(cls, name) for cls, names in TYPED.items() for name in names])
def test_the_names_that_people_type(cls, name):
    layer = nk.create(name, CHANNELS)
    assert type(layer) is cls
    assert layer(off_scale((3, CHANNELS, 5, 4), 1)).shape == (3, CHANNELS, 5, 4)


def test_every_norm_is_made_by_its_name_its_aliases_and_the_name_of_its_class():
    assert {cls.spec.name for cls in TYPED} == {*nk.list_norms()} == {*REGISTRY}
    for name, family in REGISTRY.items():
        for word in (name, *family.spec.aliases, *(cls.__name__ for cls in family.classes.values())):
            assert nk.create(word, CHANNELS, **small(name)).spec is family.spec


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("name", REGISTRY)
def test_dim_is_the_number_of_spatial_axes(name, dim):
    layer = nk.create(name, CHANNELS, dim=dim, **small(name))
    assert type(layer) is REGISTRY[name].pick(dim)
    x = off_scale((3, CHANNELS, 5, 4, 3)[: 2 + dim], 1)
    if dim == 1 and getattr(layer, "channels_first", None) is False:  # tokens: the channels are the last axis
        x = x.movedim(1, -1)
    assert layer(x).shape == x.shape


def test_a_dimension_in_the_name_goes_before_dim():
    assert type(nk.create("BatchNorm1d", CHANNELS, dim=3)) is nk.BatchNorm1d
    assert type(nk.create("bn3d", CHANNELS)) is nk.BatchNorm3d
    assert nk.create("layernorm1d", CHANNELS, dim=2).channels_first is False


@pytest.mark.parametrize("dim", [0, 4, "2", None])
def test_another_dim_is_refused(dim):
    with pytest.raises(ValueError, match=r"dim=.*1, 2 or 3 spatial axes"):
        nk.create("batch", CHANNELS, dim=dim)


def test_shorthand_tuples_and_options_say_the_same():
    texts = {
        repr(layer)
        for layer in (
            nk.create("group:4", CHANNELS),
            nk.create(("group", {"num_groups": 4}), CHANNELS),
            nk.create("group", CHANNELS, num_groups=4),
            nk.create(("group:3", {"num_groups": 4}), CHANNELS),
            nk.create("group:3", CHANNELS, num_groups=4),
            nk.factory("group:4")(CHANNELS),
            nk.factory(("group", {"num_groups": 4}))(CHANNELS),
            nk.factory("group")(CHANNELS, num_groups=4),
        )
    }
    assert texts == {repr(nk.GroupNorm(4, CHANNELS))}


def test_the_shorthand_of_dyt_is_a_number():
    assert nk.create("dyt:0.25", CHANNELS).alpha_init == 0.25
    assert nk.create("dyt:1", CHANNELS).alpha_init == 1.0
    assert nk.create("dyt:1e-1", CHANNELS).alpha.item() == torch.tensor(0.1).item()


def test_options_reach_the_layer():
    layer = nk.create(("bn", {"eps": 1e-3}), CHANNELS, momentum=None, activation="silu", backend="torch", bias=False)
    assert (layer.eps, layer.momentum, layer.backend, layer.bias) == (1e-3, None, "torch", None)
    assert isinstance(layer.activation, nn.SiLU)
    assert nk.create("layer", CHANNELS, channels_first=False).channels_first is False
    assert nk.create("rms", CHANNELS, dim=1, channels_first=True).channels_first is True


MISTAKES: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "misspelt": (lambda: nk.create("bacth", 8), ValueError, r"no norm named 'bacth'.*\n.*did you mean 'batch_norm'"),
    "close": (lambda: nk.create("rmsnrm2d", 8), ValueError, r"did you mean 'rms_norm'"),
    "unknown": (lambda: nk.create("xyzzy", 8), ValueError, r"choose from: batch_norm, derf, dyt"),
    "option": (lambda: nk.create("batch", 8, epsilon=1), ValueError | TypeError, r"no option 'epsilon'.*\n.*eps"),
    "option of another norm": (lambda: nk.create("layer", 8, momentum=0.1), TypeError, r"layer_norm has no option"),
    "no shorthand": (lambda: nk.create("layer:3", 8), ValueError, r"layer_norm takes no value after a colon"),
    "no policy": (lambda: nk.create("batch:3", 8), ValueError, r"there is no policy named '3'"),
    "no number": (lambda: nk.create("group:four", 8), ValueError, r"'four' is no whole number for num_groups"),
    "no value": (lambda: nk.create("group:", 8), ValueError, r"'' is no whole number.*as in group_norm:32"),
    "half a group": (lambda: nk.create("group:4.0", 8), ValueError, r"'4\.0' is no whole number for num_groups"),
    "no finite number": (lambda: nk.create("dyt:nan", 8), ValueError, r"'nan' is no number for alpha_init.*dyt:0\.5"),
    "groups": (lambda: nk.create("group:5", 8), ValueError, r"divisors of 8: 1, 2, 4, 8"),
    "not a name": (lambda: nk.create(3, 8), TypeError, r"named by a string or a \(name, options\) tuple, not by 3"),
    "class": (lambda: nk.create(nn.BatchNorm2d, 8), TypeError, r"named by a string"),
    "long tuple": (lambda: nk.create(("group", {}, 3), 8), ValueError, r"a norm as a tuple is \(name, options\)"),
    "tuple of names": (lambda: nk.create(("group", "batch"), 8), ValueError, r"a norm as a tuple is"),
    "tuple without a name": (lambda: nk.create((3, {}), 8), TypeError, r"not by 3"),
    "factory, name": (lambda: nk.factory("bacth"), ValueError, r"did you mean 'batch_norm'"),
    "factory, option": (lambda: nk.factory("batch", epsilon=1), TypeError, r"no option 'epsilon'"),
    "factory, dim": (lambda: nk.factory("batch", dim=5), ValueError, r"1, 2 or 3 spatial axes"),
    "activation": (lambda: nk.create("batch", 8, activation="rely"), ValueError, r"did you mean 'relu'"),
    "backend": (lambda: nk.create("batch", 8, backend="tortch"), ValueError, r"did you mean 'torch'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_with_what_to_type(mistake):
    call, kind, words = MISTAKES[mistake]
    with pytest.raises(kind if isinstance(kind, type) else kind.__args__, match=words):
        call()


@pytest.mark.parametrize("name", REGISTRY)
def test_a_factory_survives_pickling_and_makes_equal_layers(name):
    made = nk.factory(name, dim=2, activation=nn.PReLU(init=0.5), **small(name))
    again = pickle.loads(pickle.dumps(made))
    assert repr(again(CHANNELS)) == repr(made(CHANNELS))
    x = off_scale((3, CHANNELS, 5, 4), 1)
    assert again(CHANNELS)(x).equal(made(CHANNELS)(x))


@pytest.mark.parametrize("name", ["batch", ("batch", {"activation": nn.PReLU()})], ids=["option", "tuple"])
def test_layers_of_a_factory_share_nothing(name):
    activation = nn.PReLU()
    made = nk.factory(name) if isinstance(name, tuple) else nk.factory(name, activation=activation)
    first, second = made(CHANNELS), made(CHANNELS)
    assert first.activation is not second.activation
    assert not {*map(id, first.parameters())} & {*map(id, second.parameters())}
    given = name[1]["activation"] if isinstance(name, tuple) else activation
    assert given is not first.activation
    assert given is not second.activation


def test_a_factory_shows_what_it_makes():
    assert "name='group:4'" in repr(nk.factory("group:4", eps=1e-3))
    assert "eps=0.001" in repr(nk.factory("group:4", eps=1e-3))


def as_timm_takes_it(norm_layer: object) -> Callable[..., nn.Module]:
    """What ``timm.layers.get_norm_layer`` makes of a ``norm_layer=``: it names four kinds and rebinds a partial."""
    assert isinstance(norm_layer, (type, str, types.FunctionType, functools.partial))
    assert isinstance(norm_layer, functools.partial)
    assert not norm_layer.args  # they would be lost
    assert isinstance(norm_layer.func, types.FunctionType)
    return functools.partial(norm_layer.func, **norm_layer.keywords)


@pytest.mark.parametrize("name", REGISTRY)
def test_timm_takes_a_factory_apart_and_gets_the_same_layers(name):
    made = nk.factory(name, activation=nn.PReLU(init=0.5), **small(name))
    rebound = as_timm_takes_it(made)
    first, second = rebound(CHANNELS), rebound(CHANNELS, device="cpu", dtype=torch.float64)
    assert repr(first) == repr(made(CHANNELS))
    assert first.activation is not second.activation
    assert all(p.dtype == torch.float64 for n, p in second.named_parameters() if not n.startswith("activation"))


NormLayer = Callable[[int], nn.Module]


class BasicBlock(nn.Module):
    """As torchvision writes it."""

    def __init__(self, inplanes: int, planes: int, stride: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = norm_layer(planes)
        self.downsample = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), norm_layer(planes))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, norm_layer: NormLayer | None = None) -> None:
        super().__init__()
        norm_layer = nn.BatchNorm2d if norm_layer is None else norm_layer
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = norm_layer(8)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = BasicBlock(8, 8, 1, norm_layer)
        self.layer2 = BasicBlock(8, 16, 2, norm_layer)
        self.fc = nn.Linear(16, 10)
        for m in self.modules():
            if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)):
                nn.init.constant_(m.weight, 1)
                nn.init.constant_(m.bias, 0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


@pytest.mark.parametrize("name", REGISTRY)
def test_a_model_that_takes_norm_layer_takes_every_norm(name):
    """Built, pickled, trained for some steps on data that it can learn, evaluated."""
    model = ResNet(norm_layer=nk.factory("group:4" if name == "group_norm" else name))
    model = pickle.loads(pickle.dumps(model))
    assert sum(isinstance(m, REGISTRY[name].pick(2)) for m in model.modules()) == 6
    labels = torch.arange(10).repeat(2)
    x = off_scale((20, 3, 8, 8), 1) / 20 + labels[:, None, None, None] / 5
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.02), []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert model.eval()(x).isfinite().all()


def test_the_model_with_batch_is_the_model_with_torchs():
    torch.manual_seed(1)
    ours = ResNet(nk.factory("batch"))
    torchs = ResNet()
    torchs.load_state_dict(ours.state_dict())
    x, upstream = off_scale((5, 3, 8, 8), 1), torch.randn(5, 10)
    results = []
    with nk.backend("torch"):
        for model in (copy.deepcopy(ours), torchs):
            model(x).backward(upstream)
            results.append([model.eval()(x), *(p.grad for p in model.parameters()), *model.state_dict().values()])
    assert all(mine.equal(other) for mine, other in zip(*results, strict=True))
