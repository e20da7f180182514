"""nk.fold: every model here is compared in float64 with itself before; what cannot be folded says why."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import normkit as nk

IMAGE = (2, 4, 9, 8)


def lived_in(model: nn.Module) -> nn.Module:
    """The model in float64 and evaluation, as after a training: no weight is 1, no statistic 0 or 1."""
    noise = torch.Generator().manual_seed(3)
    draw = lambda t: torch.rand(t.shape, generator=noise, dtype=torch.float64)
    with torch.no_grad():
        for module in model.modules():
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if not tensor.is_floating_point():
                    continue
                if name == "running_var":
                    tensor.copy_(draw(tensor) * 4 + 0.2)
                elif tensor.dim() <= 1:
                    tensor.copy_(draw(tensor) * 2 - 0.6)
    return model.double().eval()


def image(*shape: int) -> Tensor:
    return torch.randn(*(shape or IMAGE), dtype=torch.float64) * 2 + 0.7


def norms(model: nn.Module) -> list[str]:
    kinds = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def folded(model: nn.Module, *x: Tensor) -> nn.Module:
    """The folded model, after it has been compared: exact to the rounding of float64, and the model untouched."""
    model = lived_in(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = nk.fold(model, x)
    for again in (x, [image(*part.shape) for part in x]):
        torch.testing.assert_close(result(*again), model(*again), rtol=1e-9, atol=1e-9)
    assert {*before} == {*model.state_dict()}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return result


def assert_all_gone(model: nn.Module, *x: Tensor) -> nn.Module:
    result = folded(model, *x)
    assert norms(result) == []
    assert result.certificate.refused == ()
    return result


def assert_refused(model: nn.Module, words: str, *x: Tensor, module: str | None = None) -> nn.Module:
    """Nothing is folded; the words are in the reason; the first line says that nothing was."""
    result = folded(model, *x)
    (row, *_) = [r for r in result.certificate.refused if module is None or r.module == module]
    assert words in row.reason
    assert repr(result.certificate).splitlines()[0].startswith("fold: nothing was changed; ")
    assert "refused." in result.certificate.verdict
    return result


# Into the layer before.

BEFORE = {
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), IMAGE),
    "conv2d-same": (nn.Conv2d(4, 6, 3, padding="same", bias=False), nn.BatchNorm2d(6), IMAGE),
    "conv3d": (nn.Conv3d(4, 6, 2, stride=2), nn.BatchNorm3d(6), (2, 4, 5, 4, 6)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), IMAGE),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, dilation=2), nn.BatchNorm2d(8), IMAGE),
    "transposed-1d": (nn.ConvTranspose1d(4, 6, 3, stride=2), nn.BatchNorm1d(6), (2, 4, 9)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), IMAGE),
    "transposed-square": (nn.ConvTranspose2d(4, 4, 3, output_padding=1, stride=2), nn.BatchNorm2d(4), IMAGE),
    "transposed-groups": (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), IMAGE),
    "transposed-3d": (nn.ConvTranspose3d(4, 6, 2, groups=2), nn.BatchNorm3d(6), (2, 4, 3, 4, 3)),
    "linear": (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), (5, 4)),
    "without-affine": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False), IMAGE),
    "without-a-shift": (nn.Linear(4, 6), nk.BatchNorm1d(6, bias=False), (5, 4)),
    "instance": (
        nn.Conv2d(4, 6, 3, bias=False),
        nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
        IMAGE,
    ),
    "normkit": (nn.Conv2d(4, 6, 3), nk.BatchNorm2d(6), IMAGE),
    "normkit-renormalised": (
        nn.Conv2d(4, 6, 3),
        nk.BatchNorm2d(6, statistics=nk.statistics.Renorm()),
        IMAGE,
    ),
    "synchronised": (nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6), IMAGE),
}


QUICK = ("conv2d", "grouped", "transposed-groups", "linear", "without-affine", "normkit-renormalised", "instance")


def some(cases, quick):
    """The cases as parameters: all but the quick ones are slow, since each takes an export."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("case", some(BEFORE, QUICK))
def test_into_the_layer_before(case):
    layer, norm, shape = BEFORE[case]
    model = nn.Sequential(copy.deepcopy(layer), copy.deepcopy(norm), nn.ReLU())
    result = assert_all_gone(model, image(*shape))
    assert result[0].bias is not None
    assert [type(child) for child in result.children()][1:] == [
        nk.Identity if isinstance(norm, nk.BatchNorm1d | nk.BatchNorm2d) else nn.Identity,
        nn.ReLU,
    ]


def test_the_keys_are_those_of_before_without_the_norms_and_with_a_bias_where_there_was_none():
    model = nn.Sequential(OrderedDict(a=nn.Conv2d(4, 6, 3, bias=False), n=nn.BatchNorm2d(6), b=nn.Conv2d(6, 2, 1)))
    result = assert_all_gone(model, image())
    assert [*result.state_dict()] == ["a.weight", "a.bias", "b.weight", "b.bias"]
    assert result.certificate.keys.added == ("a.bias",)
    assert [key.partition(".")[0] for key in result.certificate.keys.removed] == ["n"] * 5


def test_two_norms_in_a_row_go_into_the_layer_before_one_after_the_other():
    for bias in (True, False):
        layers = [nn.Conv2d(4, 6, 3, bias=bias), nn.BatchNorm2d(6), nk.BatchNorm2d(6), nn.ReLU()]
        assert_all_gone(nn.Sequential(*layers), image())


def test_what_moves_channels_about_may_stand_between():
    class Moved(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm, self.drop = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)

        def forward(self, x):
            return self.norm(self.drop(self.linear(x)).transpose(1, 2).contiguous()).transpose(1, 2).relu()

    assert_all_gone(Moved(), image(3, 5, 4))


@pytest.mark.slow
def test_pooling_may_stand_between():
    assert_all_gone(
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.AvgPool2d(2), nn.Flatten(2), nn.BatchNorm1d(6), nn.Tanh()), image()
    )


@pytest.mark.slow
def test_zeros_put_in_between_are_not_the_layers_own():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ZeroPad2d(1), nn.BatchNorm2d(6), nn.ReLU())
    assert_refused(model, "pad in 1 stands before it", image())


def test_a_convolution_used_twice_with_its_norm_is_folded_once():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)

        def forward(self, x, y):
            return self.norm(self.conv(x)) * self.norm(self.conv(y)).sigmoid()

    assert_all_gone(Siamese(), image(), image())


class Twice(nn.Module):
    """One convolution; the second use is by ``second``."""

    def __init__(self, second: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.second = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.conv(self.norm(self.conv(x)).relu()))


def test_a_convolution_used_again_without_the_norm_is_refused():
    assert_refused(Twice(nn.ReLU()), "conv.weight is also used by conv2d in conv, where this norm is not", image())


def test_a_convolution_with_two_norms_is_refused_for_both():
    class TwoNorms(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)

        def forward(self, x):
            x = self.conv(x)
            return self.a(x).relu() - self.b(x).tanh()

    result = assert_refused(TwoNorms(), "reads the same value, from before the norm", image())
    assert [row.module for row in result.certificate.refused] == ["a", "b"]


@pytest.mark.slow
def test_each_use_with_a_norm_of_its_own_is_refused_for_both():
    result = assert_refused(Twice(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())), "conv.weight is also used by", image())
    assert len(result.certificate.refused) == 2


def test_a_shared_norm_goes_into_both_layers_or_into_none():
    class Shared(nn.Module):
        def __init__(self, between):
            super().__init__()
            self.a, self.b, self.between, self.norm = nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3), between, nn.BatchNorm2d(6)
            self.alias = self.norm

        def forward(self, x):
            return self.norm(self.a(x)).relu() + self.alias(self.between(self.b(x))).relu()

    result = assert_all_gone(Shared(nn.Identity()), image())
    assert result.alias is result.norm
    assert_refused(Shared(nn.ReLU()), "relu in between stands before it", image())


def test_tied_layers_are_folded_only_if_both_lose_the_norm():
    class Tied(nn.Module):
        def __init__(self, second):
            super().__init__()
            self.a, self.b, self.norm, self.second = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4), second
            self.b.weight, self.b.bias = self.a.weight, self.a.bias

        def forward(self, x):
            return (self.second or self.norm)(self.b(self.norm(self.a(x)).relu())).relu()

    assert_all_gone(Tied(None), image(5, 4))
    assert_refused(Tied(nn.Tanh()), "is also used by linear in b", image(5, 4))


def test_a_value_with_a_second_reader_is_refused():
    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y).relu() + y

    assert_refused(Read(), "add in the model reads the same value, from before the norm", image())


@pytest.mark.slow
def test_a_value_that_the_model_returns_is_a_second_reader():
    class Returned(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return y, self.norm(y)

    assert_refused(Returned(), "output in the model reads the same value", image())


def test_three_axes_where_the_linear_layer_has_its_channels_last():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    assert_refused(model, "0 has its channels along axis 2, the norm along axis 1", image(2, 6, 4))


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*spectral_norm:FutureWarning")
def test_a_weight_that_is_computed_is_refused(wrap):
    model = nn.Sequential(wrap(nn.Conv2d(4, 6, 3)), nn.BatchNorm2d(6), nn.ReLU())
    assert_refused(model, "the weight of 0 is computed in every call", image())


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_model_that_cannot_be_copied_says_what_to_use():
    model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(4, 6, 3)), nn.BatchNorm2d(6))
    with pytest.raises(TypeError, match=r"cannot be copied.*\n.*parametrizations\.weight_norm"):
        nk.fold(model, torch.randn(IMAGE))


@pytest.mark.slow
def test_a_norm_that_learns_in_evaluation_or_uses_the_batch_stays():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False, affine=False))
    result = folded(model, image())
    assert [row.module for row in result.certificate.skipped] == ["1"]
    assert norms(result) == ["1"]


def test_statistics_that_are_chosen_in_every_call_are_refused():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nk.BatchNorm2d(6, statistics=nk.statistics.PerDomain(2)), nn.ReLU())
    with nk.domain(1):
        assert_refused(model, "its weight or its statistics are computed anew in every call", image())


# Into the layers behind.

BEHIND = {
    "linear": (nn.BatchNorm1d(4), nn.Linear(4, 6), (5, 4)),
    "without-a-bias": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, bias=False), IMAGE),
    "grouped": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2), IMAGE),
    "reflecting": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), IMAGE),
    "circular": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), IMAGE),
    "valid": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding="valid"), IMAGE),
    "pooled": (nn.BatchNorm2d(4), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)), IMAGE),
    "flattened": (nn.BatchNorm2d(4), nn.Sequential(nn.Flatten(), nn.Linear(4 * 9 * 8, 3)), IMAGE),
    "twice": (nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)), nn.Conv2d(4, 6, 3), IMAGE),
}


@pytest.mark.parametrize("case", some(BEHIND, ("linear", "reflecting", "flattened", "twice")))
def test_into_the_layers_behind(case):
    norm, layer, shape = BEHIND[case]
    assert_all_gone(nn.Sequential(nn.Tanh(), copy.deepcopy(norm), copy.deepcopy(layer), nn.ReLU()), image(*shape))


IN_THE_WAY = [
    (nn.Conv2d(4, 6, 3, padding=1), "pads with zeros"),
    (nn.Conv2d(4, 6, 3, padding="same"), "pads with zeros"),
    (nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(4, 6, 3)), "pads with zeros"),
    (nn.ConvTranspose2d(4, 6, 3), "is transposed"),
    (nn.Sequential(nn.ReLU(), nn.Conv2d(4, 6, 3)), "relu in 2.0 reads what it makes"),
    (nn.Linear(8, 3), "has its channels along axis 3, the norm along axis 1"),
    (nn.Sequential(nn.AvgPool2d(3, padding=1), nn.Conv2d(4, 6, 3)), "avg_pool2d in 2.0 reads what it makes"),
    (nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, 6, 3)), "reads what"),
    (nn.Identity(), "the model returns what it makes"),
]


@pytest.mark.parametrize(
    ("layer", "words"), [*IN_THE_WAY[:1], *(pytest.param(*case, marks=pytest.mark.slow) for case in IN_THE_WAY[1:])]
)
def test_what_stands_in_the_way_behind(layer, words):
    result = assert_refused(nn.Sequential(nn.Tanh(), nn.BatchNorm2d(4), layer), words, image())
    assert "cannot go into the layer before it: tanh in 0 stands before it" in result.certificate.refused[0].reason


def test_a_norm_of_the_input_goes_into_the_layer_behind():
    result = assert_all_gone(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)), image())
    assert result.certificate.changed[0].action == "BatchNorm2d folded into what is behind it"


def test_a_layer_takes_in_a_norm_from_each_side():
    model = nn.Sequential(nn.Tanh(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.ReLU())
    result = assert_all_gone(model, image())
    assert [row.module for row in result.certificate.changed] == ["3", "1"]


# Weight and bias of the norms whose statistics are those of the input.


class Block(nn.Module):
    """A norm, and two layers that read it."""

    def __init__(self, norm: nn.Module, *, second: bool = True, channels_first: bool = False) -> None:
        super().__init__()
        self.norm = norm
        one = lambda: nn.Conv2d(4, 6, 1, bias=False) if channels_first else nn.Linear(4, 6, bias=False)
        self.a, self.b, self.second = one(), one(), second

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.a(y) * (self.b(y) if self.second else y.mean())


ROWS = [nn.LayerNorm(4), nn.LayerNorm(4, bias=False), nn.RMSNorm(4), nk.LayerNorm(4), nk.RMSNorm(4)]
CHANNELS = [
    nn.GroupNorm(2, 4),
    nn.InstanceNorm2d(4, affine=True),
    nk.GroupNorm(2, 4),
    nk.LayerNorm(4, channels_first=True),
    nk.RMSNorm(4, channels_first=True),
    nk.InstanceNorm2d(4, affine=True),
    nn.BatchNorm2d(4, track_running_stats=False),
]


@pytest.mark.parametrize("norm", some([*ROWS, *CHANNELS], [ROWS[0], ROWS[2], *CHANNELS[2:4]]), ids=str)
def test_weight_and_bias_go_into_the_layers_behind(norm):
    model = Block(copy.deepcopy(norm), channels_first=norm in CHANNELS)
    result = folded(model, image(2, 5, 4) if norm in ROWS else image())
    assert result.certificate.changed[0].detail.startswith("into a, b")
    assert result.norm.weight is None
    assert [key for key in result.state_dict() if key.startswith("norm.")] == []
    shifts = getattr(norm, "bias", None) is not None
    assert (result.a.bias is not None) == shifts


@pytest.mark.slow
def test_a_second_kind_of_reader_keeps_weight_and_bias():
    assert_refused(Block(nn.LayerNorm(4), second=False), "mean in the model reads what it makes", image(2, 5, 4))


class WrittenOut(nn.Module):
    """RMS norm as language models have it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float64)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def test_a_norm_that_is_written_out_is_left_with_ones():
    result = folded(Block(WrittenOut(4)), image(2, 5, 4))
    assert torch.equal(result.norm.weight, torch.ones(4, dtype=torch.float64))
    assert "norm.weight" in result.state_dict()
    assert "a weight of ones" in result.certificate.changed[0].detail


def test_a_scale_alone_goes_into_a_convolution_that_pads():
    model = nn.Sequential(nk.RMSNorm(4, channels_first=True), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU())
    assert folded(model, image())[0].weight is None


def test_a_weight_for_every_element_is_refused():
    model = nn.Sequential(nn.LayerNorm((9, 8)), nn.Linear(8, 2))
    assert_refused(model, "a weight for every element of (9, 8)", image())


@pytest.mark.slow
def test_a_weight_that_another_layer_reads_is_refused():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)
            self.linear.bias = self.norm.bias

        def forward(self, x):
            return self.linear(self.norm(x))

    assert_refused(Tied(), "is also read by linear in linear", image(2, 4))


# Norms that are no layer of their own.


class Functional(nn.Module):
    """timm's BatchNormAct2d in outline: a subclass of the layer whose forward calls the function."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = BatchNormAct2d(size)
        self.conv = nn.Conv2d(4, size, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class BatchNormAct2d(nn.BatchNorm2d):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.drop, self.act = nn.Dropout(0.2), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, "four axes")
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        by_the_batch = self.training or (self.running_mean is None and self.running_var is None)
        x = F.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            by_the_batch,
            0.1,
            self.eps,
        )
        return self.act(self.drop(x))


def test_a_subclass_keeps_what_its_forward_does_beside_the_norm():
    result = folded(Functional(6), image())
    assert result.certificate.refused == ()
    assert result.certificate.changed[0].detail == "into conv; BatchNormAct2d has a forward without it"
    assert isinstance(result.norm.act, nn.SiLU)
    assert [*result.state_dict()] == ["conv.weight", "conv.bias"]


class SplitBatchNorm2d(nn.BatchNorm2d):
    """timm's in outline: parts of the batch have norms of their own in training, and one norm in evaluation."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.aux_bn = nn.ModuleList([nn.BatchNorm2d(size)])

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            first, second = input.chunk(2)
            return torch.cat([super().forward(first), self.aux_bn[0](second)])
        return super().forward(input)


def test_a_norm_that_is_split_in_training_is_folded_as_it_is_in_evaluation():
    result = folded(nn.Sequential(nn.Conv2d(4, 6, 3), SplitBatchNorm2d(6), nn.ReLU()), image())
    assert result.certificate.changed[0].detail == "into 0; SplitBatchNorm2d has a forward without it"
    assert [(row.module, row.reason) for row in result.certificate.skipped] == [
        ("1.aux_bn.0", "it was not called on example_inputs")
    ]


def test_a_norm_whose_weight_others_read_keeps_one_of_ones():
    """torch's transformer looks at the weights of its norms before it decides how to compute."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    result = folded(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), image(2, 5, 8))
    assert [row.module for row in result.certificate.changed] == ["layers.0.norm2", "layers.0.norm1"]
    assert (result.layers[0].norm1.weight == 1).all()


def test_a_norm_inside_autocast_is_found_in_its_layer():
    class Auto(nn.Sequential):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x).relu()

    assert isinstance(assert_all_gone(Auto(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), image())[1], nn.Identity)


class ByFunction(nn.Module):
    """The whole block in one forward, with buffers of its own and an argument that has a default."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.second = nn.Conv2d(4, 6, 3), nn.ModuleList([nn.Conv2d(6, 6, 1)])
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("running_var", torch.ones(6))
        self.register_buffer("kept", torch.ones(2))
        self.gamma = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor, scale: float = 2.0, y: Tensor | None = None) -> Tensor:
        x = F.batch_norm(self.conv(x), self.mean, self.running_var, self.gamma, None, False, 0.1, 1e-3)
        return self.second[0](x.relu()) * scale


def test_a_function_in_the_models_own_forward():
    result = folded(ByFunction(), image())
    assert result.certificate.refused == ()
    keys = [f"{layer}.{part}" for layer in ("conv", "second.0") for part in ("weight", "bias")]
    assert [*result.state_dict()] == ["kept", *keys]
    x = image()
    torch.testing.assert_close(result(x, 2.0, None), result(x))
    again = pickle.loads(pickle.dumps(result))
    assert torch.equal(again(x), copy.deepcopy(result)(x))


def test_a_function_in_a_forward_that_cannot_be_written_down_is_refused():
    class Branching(ByFunction):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] > 100:
                return x
            return super().forward(x)

    assert_refused(Branching(), "whose forward branches on a value", image())


class RepBN(nn.Module):
    """Linear attention's replacement of a layer norm: batch norm with a skip, on (n, l, c)."""

    def __init__(self, size: int, alpha: nn.Parameter | float) -> None:
        super().__init__()
        self.alpha, self.bn = alpha, nn.BatchNorm1d(size)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        x = self.bn(x) + self.alpha * x
        return x.transpose(1, 2)


@pytest.mark.parametrize(
    "alpha",
    [nn.Parameter(torch.ones(1)), 0.3, nn.Parameter(torch.ones(4, 1))],
    ids=["one weight", "number", "weight per channel"],
)
def test_a_norm_with_a_skip_goes_into_the_linear_layer_behind(alpha):
    model = nn.Sequential(nn.Tanh(), RepBN(4, copy.deepcopy(alpha)), nn.Linear(4, 6))
    result = assert_all_gone(model, image(2, 5, 4))
    assert result.certificate.changed[0].module == "1"
    assert [*result.state_dict()] == ["2.weight", "2.bias"]


@pytest.mark.slow
def test_a_norm_with_a_skip_goes_into_the_layer_before():
    assert_all_gone(nn.Sequential(nn.Linear(4, 4), RepBN(4, nn.Parameter(torch.ones(1))), nn.Tanh()), image(2, 5, 4))


def test_a_norm_and_its_input_added_as_they_are():
    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1)

        def forward(self, x):
            x = x.tanh()
            return self.conv(x + self.bn(x))

    assert_all_gone(Added(), image())


@pytest.mark.slow
def test_a_residual_that_is_another_value_is_no_skip():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(self.conv(x)) + 0.5 * x

    result = assert_all_gone(Residual(), image())
    assert result.certificate.changed[0].module == "bn"


def test_activation_and_residual_of_normkits_layer_stay():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nk.BatchNorm2d(4, activation="relu")

        def forward(self, x):
            return self.norm(self.conv(x), residual=x)

    result = assert_all_gone(Fused(), image())
    assert isinstance(result.norm, nk.Identity)
    assert isinstance(result.norm.activation, nn.ReLU)


# What a fold holds on to.


@pytest.mark.parametrize("trains", [True, False])
def test_what_trains_is_what_trained(trains):
    model = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1))
    model[0].weight.requires_grad = not trains
    model[1].bias.requires_grad = trains
    model[2].weight.requires_grad = trains
    result = folded(model, image())
    asked = {name: parameter.requires_grad for name, parameter in result.named_parameters()}
    assert asked == {"0.weight": not trains, "0.bias": trains, "2.weight": trains, "2.bias": True}


@pytest.mark.slow
def test_hooks_stand_in_the_way():
    for module in (0, 1):
        model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        model[module].register_forward_hook(lambda *_: None)
        assert_refused(model, "hooks, which would see another value", image())


def test_a_filter_leaves_norms_out_and_is_told_the_names():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6))
    result = nk.fold(lived_in(model), image(), filter_fn=lambda module, name: name == "3")
    assert norms(result) == ["1"]
    assert [(row.module, row.reason) for row in result.certificate.skipped] == [("1", "filter_fn left it out")]


def test_a_plan_is_the_certificate_of_what_would_be_done():
    model = lived_in(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)))
    planned = nk.plan(nk.fold, model, image())
    assert planned.verdict == "fold (planned): 1 x BatchNorm2d folded into the layer before it."
    assert planned.changed == nk.fold(model, image()).certificate.changed


def test_nothing_to_take_back_and_nothing_left_to_fold():
    result = assert_all_gone(nn.Sequential(nn.Conv2d(4, 6, 3), nk.BatchNorm2d(6, activation="relu")), image())
    with pytest.raises(RuntimeError, match="the model that was given is as it was"):
        result.certificate.undo()
    again = nk.fold(result, image())
    assert again.certificate.verdict == "fold: nothing was changed."
    assert copy.deepcopy(again).certificate.verdict == again.certificate.verdict


def test_a_norm_that_was_not_called_is_counted():
    class Unused(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Conv2d(4, 6, 3))
            self.aside = nn.BatchNorm2d(6)

        def forward(self, x):
            return self[0](x)

    (row,) = nk.fold(lived_in(Unused()), image()).certificate.skipped
    assert (row.module, row.reason) == ("aside", "it was not called on example_inputs")


def test_a_model_in_training_stays_in_training_and_its_fold_is_for_evaluation():
    model = lived_in(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5))).train()
    result = nk.fold(model, image())
    assert model.training
    assert not any(module.training for module in result.modules())


def test_parts_are_folded_where_the_whole_cannot_be_exported():
    """The branch on a value is in the whole; block and tail are folded, and the norm between two parts says why not."""

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))])
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.blocks[0](x)
            if x.sum() > 1e9:
                return x
            return self.norm(self.conv(x)).relu()

    result = folded(Branching(), image())
    assert norms(result) == ["norm"]
    (row,) = result.certificate.refused
    assert row.module == "norm"
    assert "what is around norm cannot be seen: torch.export refuses the model: " in row.reason


def test_dicts_go_in_and_come_out():
    class Dicts(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, *, pixels, mask=None):
            return {"logits": self.norm(self.conv(pixels)).relu(), "mask": mask}

    model = lived_in(Dicts())
    batch = {"pixels": image(), "mask": torch.ones(2, dtype=torch.bool)}
    result = nk.fold(model, batch)
    assert norms(result) == []
    torch.testing.assert_close(result(**batch)["logits"], model(**batch)["logits"])


@pytest.mark.parametrize("dtype", some([torch.float32, torch.bfloat16, torch.float16], [torch.bfloat16]), ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_types_and_layouts(dtype, memory_format):
    model = lived_in(nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()))
    x = image().to(dtype).to(memory_format=memory_format)
    exact = model(x.double())
    result = nk.fold(model.to(dtype).to(memory_format=memory_format), x)
    assert {parameter.dtype for parameter in result.parameters()} == {dtype}
    assert result(x).is_contiguous(memory_format=memory_format)
    assert (result(x).double() - exact).abs().max() <= 8 * torch.finfo(dtype).eps * exact.abs().max()


def test_a_wrong_fold_is_seen_even_where_the_statistics_are_those_of_a_new_model(monkeypatch):
    """The rehearsal moves them; without it this mistake would be 0."""
    from normkit.surgery.folding.sites import Constants

    right = Constants.affine
    wrong = lambda self, tensors: (right(self, tensors)[0], torch.zeros_like(right(self, tensors)[0]))
    monkeypatch.setattr(Constants, "affine", wrong)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).eval()
    with pytest.raises(RuntimeError, match="fold: the result is not what was planned"):
        nk.fold(model, torch.randn(IMAGE))


def test_a_batch_that_the_model_does_not_take():
    with pytest.raises(ValueError, match="example_inputs: the model raises"):
        nk.fold(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), torch.randn(2, 5, 4))


def test_a_wrapper_is_refused_by_name():
    with pytest.raises(TypeError, match="fold: the model is compiled already"):
        nk.fold(torch.compile(nn.Sequential(nn.BatchNorm2d(4)), backend="eager"), torch.randn(IMAGE))
