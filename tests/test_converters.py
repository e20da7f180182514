"""Tools of torch that rebuild or read batch norms: for each, what our layers keep and what they lose.

docs/deviations.md has the same list for readers. What is lost in silence is the activation, in three tools that take
any subclass and know nothing of it. They read attributes and never call the layer, so nothing could object.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, replace_all_batch_norm_modules_, vmap
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import normkit as nk
from twins import CHANNELS, assert_same, away_from_one, off_scale

PAGE = Path(__file__).parent.parent / "docs" / "deviations.md"
EPS32 = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def _torchs_operators():
    with nk.backend("torch"):
        yield


def settled(layer: nn.Module) -> nn.Module:
    """Parameters and statistics away from 1 and 0."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(away_from_one(parameter))
        for module in layer.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.copy_(torch.linspace(-20.0, 40.0, CHANNELS))
                module.running_var.copy_(torch.linspace(0.25, 81.0, CHANNELS))
                module.num_batches_tracked.fill_(3)
    return layer


def convolution_and(norm: nn.Module) -> nn.Sequential:
    return settled(nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3), norm)).eval()


def image() -> Tensor:
    return off_scale((5, CHANNELS, 6, 5), 1)


# torch.nn.SyncBatchNorm.convert_sync_batchnorm


def test_convert_sync_batchnorm_keeps_the_state_and_loses_the_options():
    model = settled(nn.Sequential(nk.BatchNorm2d(CHANNELS, momentum=None, activation=nn.PReLU(), backend="torch")))
    before = copy.deepcopy(model.state_dict())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)[0]
    assert type(converted) is nn.SyncBatchNorm
    assert_same({f"0.{name}": value for name, value in converted.state_dict().items()}, before)
    assert converted.momentum is None
    assert converted.running_mean.dtype == torch.float32
    assert isinstance(converted.activation, nn.PReLU)  # the trace that remains: a child that nobody calls
    assert "(activation): PReLU" in repr(converted)
    assert not hasattr(converted, "backend")
    with pytest.raises(TypeError, match="residual"):  # this loss is loud
        converted.eval()(image(), residual=image())


def test_convert_sync_batchnorm_loses_the_activation_in_silence():
    layer = settled(nk.BatchNorm2d(CHANNELS, activation="relu")).eval()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(layer).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = converted(image())
    assert (y < 0).any()
    assert (layer(image()) >= 0).all()


def test_convert_sync_batchnorm_loses_the_guard_the_wide_buffers_and_the_hooks():
    layer = nk.BatchNorm2d(CHANNELS)
    layer.register_forward_hook(lambda *call: None)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(layer).bfloat16()
    assert not converted._forward_hooks
    assert converted.running_var.dtype == torch.bfloat16
    assert not hasattr(converted, "num_batches_skipped")


def test_convert_sync_batchnorm_without_bias_makes_none():
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(nk.BatchNorm2d(CHANNELS, bias=False))
    assert converted.bias is None
    assert [*converted.state_dict()] == [*nk.BatchNorm2d(CHANNELS, bias=False).state_dict()]


def test_convert_sync_batchnorm_leaves_other_norms_alone():
    names = [name for name in nk.list_norms() if name != "batch_norm"]
    model = nn.Sequential(*(nk.create("group:3" if name == "group_norm" else name, CHANNELS) for name in names))
    before = [*model]
    assert [*nn.SyncBatchNorm.convert_sync_batchnorm(model)] == before


# torch.nn.utils.fusion


def folding_error(product: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """The same terms, multiplied before they are added: an error of each, as large as the largest."""
    terms = product.weight[0].numel() + 4
    largest = x.abs().max() * product.weight.abs().max() + product.bias.abs().max() + norm.running_mean.abs().max()
    weight = 1.0 if norm.weight is None else norm.weight.abs().max()
    return terms * EPS32 * largest * weight / (norm.running_var.min() + norm.eps).sqrt()


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}], ids=str)
def test_fuse_conv_bn_eval_is_right_without_an_activation(options):
    model, x = convolution_and(nk.BatchNorm2d(CHANNELS, **options)), image()
    fused = fuse_conv_bn_eval(*model)
    assert type(fused) is nn.Conv2d
    assert ((fused(x) - model(x)).abs() <= folding_error(*model, x)).all()


def test_fuse_conv_bn_eval_loses_the_activation_in_silence():
    model = convolution_and(nk.BatchNorm2d(CHANNELS, activation="relu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused = fuse_conv_bn_eval(*model)
    x = image()
    without = copy.deepcopy(model)
    without[1].activation = None
    assert ((fused(x) - without(x)).abs() <= folding_error(*model, x)).all()
    assert (fused(x) < 0).any()
    assert (model(x) >= 0).all()


def test_fuse_linear_bn_eval_loses_the_activation_in_silence():
    model = settled(nn.Sequential(nn.Linear(CHANNELS, CHANNELS), nk.BatchNorm1d(CHANNELS, activation="relu"))).eval()
    fused, x = fuse_linear_bn_eval(*model), off_scale((5, CHANNELS), 1)
    without = copy.deepcopy(model)
    without[1].activation = None
    assert ((fused(x) - without(x)).abs() <= folding_error(*model, x)).all()
    assert (fused(x) < 0).any()


def test_fuse_conv_bn_eval_refuses_a_layer_without_statistics():
    with pytest.raises(AssertionError, match="running_mean"):
        fuse_conv_bn_eval(nn.Conv2d(3, CHANNELS, 3).eval(), nk.BatchNorm2d(CHANNELS, track_running_stats=False).eval())


# torch.fx.experimental.optimization.fuse, torch.ao.quantization.fuse_modules: they want torch's class itself


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, when the tool is loaded
def test_fx_fuse_leaves_our_layers_as_they_are():
    from torch.fx.experimental import optimization

    model = convolution_and(nk.BatchNorm2d(CHANNELS, activation="relu"))
    fused, x = optimization.fuse(model), image()
    assert isinstance(fused.get_submodule("1"), nk.BatchNorm2d)
    assert fused(x).equal(model(x))
    torchs = optimization.fuse(convolution_and(nn.BatchNorm2d(CHANNELS)))
    assert [node.target for node in torchs.graph.nodes if node.op == "call_module"] == ["0"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.ao.quantization is on its way out of torch
def test_quantization_refuses_our_layers_aloud():
    quantization = pytest.importorskip("torch.ao.quantization", reason="torch has moved it to torchao")
    model = convolution_and(nk.BatchNorm2d(CHANNELS))
    with pytest.raises((AssertionError, NotImplementedError), match="BatchNorm2d"):
        quantization.fuse_modules(model, [["0", "1"]])


# torch.utils.mkldnn


@pytest.mark.parametrize("activation", ["relu", nn.PReLU()], ids=["relu", "prelu"])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, when the tool is loaded
def test_to_mkldnn_refuses_an_activation_aloud(activation):
    """It takes any subclass, and stumbles over the child module: the trace that is left of the activation."""
    from torch.utils import mkldnn

    with pytest.raises(RuntimeError, match="'activation'"):
        mkldnn.to_mkldnn(convolution_and(nk.BatchNorm2d(CHANNELS, activation=activation)))


# torch.optim.swa_utils


def options(layer: nn.Module) -> tuple[object, ...]:
    return layer.momentum, layer.activation, layer.backend, layer.training


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(7)
    for k in range(4):
        yield image() + k * torch.randn(1, CHANNELS, 1, 1, generator=generator)


def test_update_bn_gives_torchs_statistics_and_leaves_the_options():
    ours, torchs = settled(nk.BatchNorm2d(CHANNELS, activation="silu")), settled(nn.BatchNorm2d(CHANNELS))
    data, before = [*batches()], options(ours)
    for layer in (ours, torchs):
        update_bn(data, nn.Sequential(layer))
    assert options(ours) == before
    assert ours.num_batches_tracked.equal(torchs.num_batches_tracked)
    for name in ("running_mean", "running_var"):
        got, wanted = getattr(ours, name), getattr(torchs, name)
        assert ((got - wanted).abs() <= 2 * len(data) * EPS32 * wanted.abs().max()).all()


def test_update_bn_is_not_spoilt_by_one_bad_batch():
    ours, torchs = nk.BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS)
    data = [*batches()]
    bad = [*data[:2], torch.full_like(data[0], torch.nan), *data[2:]]
    update_bn(bad, nn.Sequential(ours)), update_bn(bad, nn.Sequential(torchs))
    assert torchs.running_mean.isnan().all()
    clean = nk.BatchNorm2d(CHANNELS)
    update_bn(data, nn.Sequential(clean))
    assert_same(ours.state_dict(), clean.state_dict())
    assert ours.num_batches_skipped.item() == 1


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_model_keeps_the_class_the_options_and_torchs_averages(use_buffers):
    averages, data, start = [], [*batches()], settled(nk.BatchNorm2d(CHANNELS)).state_dict()
    for namespace in (nk, nn):
        model = nn.Sequential(namespace.BatchNorm2d(CHANNELS))
        model[0].load_state_dict(start)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
        for x in data:
            model(x)
            average.update_parameters(model)
        averages.append(average)
    ours, torchs = averages
    assert type(ours.module[0]) is nk.BatchNorm2d
    assert_same(ours.state_dict(), torchs.state_dict())


def test_averaged_model_keeps_the_activation():
    model = nn.Sequential(nk.BatchNorm2d(CHANNELS, activation=nn.PReLU(), backend="torch"))
    average = AveragedModel(model).module[0]
    assert isinstance(average.activation, nn.PReLU)
    assert average.activation is not model[0].activation
    assert average.backend == "torch"
    assert average.running_mean.dtype == torch.float32


# torch.func.replace_all_batch_norm_modules_


def test_replace_all_batch_norm_modules_takes_the_statistics_and_leaves_the_rest():
    model = settled(nn.Sequential(nk.BatchNorm2d(CHANNELS, activation="relu")))
    torchs = settled(nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.ReLU()))
    torchs[0].load_state_dict(model[0].state_dict())
    for each in (model, torchs):
        replace_all_batch_norm_modules_(each)
    assert model[0].running_mean is model[0].num_batches_tracked is None
    assert {*model.state_dict()} == {*torchs.state_dict()}
    assert isinstance(model[0].activation, nn.ReLU)
    xs = torch.stack([image(), image()])
    state = dict(model.named_parameters()), dict(torchs.named_parameters())
    got, wanted = (
        vmap(lambda x, m=m, s=s: functional_call(m, s, (x,)))(xs) for m, s in zip((model, torchs), state, strict=True)
    )
    assert got.equal(wanted)
    assert (model[0](image()) >= 0).all()


# The page.

TOOLS = {
    nn.SyncBatchNorm.convert_sync_batchnorm: "torch.nn.SyncBatchNorm.convert_sync_batchnorm",
    fuse_conv_bn_eval: "torch.nn.utils.fusion.fuse_conv_bn_eval",
    fuse_linear_bn_eval: "torch.nn.utils.fusion.fuse_linear_bn_eval",
    update_bn: "torch.optim.swa_utils.update_bn",
    AveragedModel: "torch.optim.swa_utils.AveragedModel",
    replace_all_batch_norm_modules_: "torch.func.replace_all_batch_norm_modules_",
}


def lines_of_the_page() -> list[list[str]]:
    """The cells of every line of its tables."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_page_has_every_tool():
    named = {cells[0].strip("`") for cells in lines_of_the_page()}
    loaded_late = {
        "torch.fx.experimental.optimization.fuse",
        "torch.ao.quantization.fuse_modules",
        "torch.utils.mkldnn.to_mkldnn",
    }
    assert {*TOOLS.values(), *loaded_late} <= named


def test_every_line_of_the_page_names_a_test_that_is_there():
    sources = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    named = [cells[3] for cells in lines_of_the_page() if cells[3] != "test"]
    assert len(named) >= 25
    assert [name for name in named if f"def {name.strip('`')}(" not in sources] == []
