"""Rows of docs/conformance.md that are about folding and exporting: first shown on torch's tools, then on nk.fold.

A test whose name begins with test_torch goes red when torch mends the thing; then docs/conformance.md wants a new line.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval

import normkit as nk
from test_fold import IMAGE, Functional, lived_in, norms, some

LINEAR, TRANSPOSED = nn.Linear(4, 6), nn.ConvTranspose2d(4, 4, 3)


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(IMAGE) * 2 + 1).to(dtype)


class Dicts(nn.Module):
    """A model that is called with the parts of a dict and gives one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *, image: Tensor, label: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.model(image)}


MANNERS = {
    "float32": (torch.float32, torch.contiguous_format, False),
    "dict": (torch.float32, torch.contiguous_format, True),
    "bfloat16": (torch.bfloat16, torch.contiguous_format, False),
    "channels_last": (torch.float32, torch.channels_last, False),
}
each_manner = pytest.mark.parametrize("manner", some(MANNERS, ["float32"]))


def assert_folds(model: nn.Module, x: Tensor, manner: str) -> nn.Module:
    """All norms go, and the outputs are those of the exact model to the digits of the type."""
    dtype, layout, as_dict = MANNERS[manner]
    model = lived_in(model)
    exact = model(x.to(dtype).double())
    model, x = model.to(dtype), x.to(dtype)
    if x.dim() == 4:
        model, x = model.to(memory_format=layout), x.contiguous(memory_format=layout)
    if as_dict:
        folded = nk.fold(Dicts(model), {"image": x, "label": torch.zeros(len(x))})
        found = folded(image=x)["logits"]
    else:
        folded = nk.fold(model, x)
        found = folded(x)
    assert norms(folded) == []
    assert found.dtype == dtype
    if x.dim() == 4:
        assert found.is_contiguous(memory_format=layout)
    # The rounding of the weights and of two steps, each of a sum over some dozens of products.
    assert (found.double() - exact).abs().max() <= 16 * torch.finfo(dtype).eps * exact.abs().max()
    return folded


# Row 7: a norm without weight or bias.


@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}], ids=str)
def test_torch_row_7_a_linear_layer_does_not_take_in_a_norm_without_weight_or_bias(options):
    with pytest.raises(TypeError):
        fuse_linear_bn_eval(copy.deepcopy(LINEAR).eval(), nn.BatchNorm1d(6, **options).eval())


@each_manner
@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}], ids=str)
def test_normkit_row_7_a_norm_without_weight_or_bias_is_folded(options, manner):
    assert_folds(nn.Sequential(copy.deepcopy(LINEAR), nn.BatchNorm1d(6, **options)), torch.randn(5, 4), manner)


# Row 8: transposed convolutions.


def test_torch_row_8_transposed_convolutions_are_wrong_in_silence_or_raise():
    norm = nn.BatchNorm2d(4)
    model = lived_in(nn.Sequential(copy.deepcopy(TRANSPOSED), norm)).float()
    x = images()
    error = (fuse_conv_bn_eval(model[0], model[1])(x) - model(x)).abs().max()
    assert error > 0.1 * model(x).abs().max()
    grouped = nn.ConvTranspose2d(4, 6, 3, groups=2).eval()
    with pytest.raises(RuntimeError):
        fuse_conv_bn_eval(grouped, nn.BatchNorm2d(6).eval(), transpose=True)


@each_manner
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_normkit_row_8_transposed_convolutions_are_folded(groups, manner):
    layer = nn.ConvTranspose2d(4, 4, 3, groups=groups)
    assert_folds(nn.Sequential(layer, nn.BatchNorm2d(4)), images(), manner)


# Row 9: the order of the children is not the flow of the values.


class TwoNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.conv(x)) + self.b(self.conv(x)).relu()


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.a = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.a(self.conv(x)).relu())


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.a = nn.Linear(4, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.linear(x)).relu()


WRONG_IN_SILENCE = {
    "two norms on one convolution": (TwoNorms, IMAGE),
    "a convolution used again": (Reused, IMAGE),
    "three axes": (Rows, (2, 6, 4)),
}


@pytest.mark.parametrize("case", WRONG_IN_SILENCE)
def test_torch_row_9_fuse_is_wrong_in_silence(case):
    with warnings.catch_warnings(action="ignore"):  # what the import says of torch.jit
        from torch.fx.experimental.optimization import fuse
    make, shape = WRONG_IN_SILENCE[case]
    model, x = lived_in(make()).float(), torch.randn(shape)
    assert (fuse(model)(x) - model(x)).abs().max() > 0.1 * model(x).abs().max()


@pytest.mark.parametrize("manner", some(["float32", "bfloat16"], ["float32"]))
@pytest.mark.parametrize("case", WRONG_IN_SILENCE)
def test_normkit_row_9_what_cannot_be_folded_is_refused_with_the_reason(case, manner):
    make, shape = WRONG_IN_SILENCE[case]
    dtype = MANNERS[manner][0]
    model, x = lived_in(make()).to(dtype), torch.randn(shape).to(dtype)
    folded = nk.fold(model, x)
    assert torch.equal(folded(x), model(x))
    assert len(folded.certificate.refused) == len(norms(model))
    assert folded.certificate.verdict.startswith("fold: nothing was changed; ")


# Row 10: half precision.


def half(model: nn.Module) -> nn.Module:
    """A convolution whose folded weight is about 180, as behind a channel that hardly varies."""
    with torch.no_grad():
        model[1].running_var.fill_(3e-5)
        model[1].weight.fill_(1.37)
    return model.half().eval()


def errors(model: nn.Module, weight: Tensor) -> float:
    """How far a folded weight is from the exact one, in units of its last place."""
    conv, norm = (dict(layer.state_dict()) for layer in model)
    scale = norm["weight"].double() / (norm["running_var"].double() + model[1].eps).sqrt()
    exact = conv["weight"].double() * scale.view(-1, 1, 1, 1)
    last_place = torch.finfo(torch.float16).eps * 2.0 ** exact.abs().log2().floor()
    return float(((weight.detach().double() - exact).abs() / last_place).max())


def test_torch_row_10_folding_in_half_precision_rounds_at_every_step():
    model = half(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)))
    assert errors(model, fuse_conv_bn_eval(model[0], model[1]).weight) > 0.75


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_normkit_row_10_folding_in_half_precision_rounds_once(layout):
    model = half(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))).to(memory_format=layout)
    folded = nk.fold(model, images(torch.float16).contiguous(memory_format=layout))
    assert errors(model, folded[0].weight) <= 0.5001


# Row 18: an exported program that is moved to evaluation.


def unusual() -> nn.Module:
    """A norm whose eps is a good part of its variance."""
    model = Functional(6)
    model.norm = nn.BatchNorm2d(6, eps=0.5, momentum=0.3)
    return lived_in(model).float()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what the imports say
def test_torchao_row_18_a_program_in_evaluation_has_the_default_eps():
    pt2e = pytest.importorskip(
        "torchao.quantization.pt2e", reason="torchao is not installed: `make test-all` installs it"
    )
    model, x = unusual(), images()
    program = torch.export.export(model.train(), (x,)).module()
    pt2e.move_exported_model_to_eval(program)
    wanted = model.eval()(x)
    assert (program(x) - wanted).abs().max() > 0.1 * wanted.abs().max()


@each_manner
def test_normkit_row_18_a_folded_model_is_exported_as_it_computes(manner):
    folded = assert_folds(unusual(), images(), manner)
    x = images(MANNERS[manner][0]).contiguous(memory_format=MANNERS[manner][1])
    args, kwargs = ((), {"image": x}) if MANNERS[manner][2] else ((x,), {})
    program = torch.export.export(folded, args, kwargs)
    assert not any("norm" in str(node.target) for node in program.graph.nodes if node.op == "call_function")
    torch.testing.assert_close(program.module()(*args, **kwargs), folded(*args, **kwargs))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's exporter has many
def test_a_folded_model_goes_to_onnx_without_a_norm(tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: `make test-all` installs it")
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: `make test-all` installs it")
    from onnx.reference import ReferenceEvaluator

    layers = [nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2)]
    model = lived_in(nn.Sequential(*layers, nn.BatchNorm2d(4), Functional(5))).float()
    x = images()
    folded = nk.fold(model, x)
    torch.onnx.export(folded, (x,), tmp_path / "folded.onnx", dynamo=True, verbose=False)
    written = onnx.load(tmp_path / "folded.onnx")
    assert not {"BatchNormalization"} & {node.op_type for node in written.graph.node}
    (name,) = [given.name for given in written.graph.input]
    (found,) = ReferenceEvaluator(written).run(None, {name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-4, atol=1e-4)
