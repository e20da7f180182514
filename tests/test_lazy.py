"""Lazy layers: torch's, that keep our options when they learn their size."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

import normkit as nk
from twins import CHANNELS, LAZY, TWINS, assert_same, step, variants

EVERY = [variant for twin in LAZY for variant in variants(twin)]
each_lazy = pytest.mark.parametrize("twin", LAZY, ids=str)
each_variant = pytest.mark.parametrize("twin", EVERY, ids=str)
SIZED = {(twin.spec.name, twin.dim): twin for twin in TWINS}


def test_batch_and_instance_norm_have_lazy_variants_for_every_dimension():
    assert {(twin.spec.name, twin.dim) for twin in LAZY} == {
        (name, dim) for name in ("batch_norm", "instance_norm") for dim in (1, 2, 3)
    }


@each_lazy
def test_it_is_torchs_lazy_class_and_becomes_ours(twin):
    layer = twin.layer()
    assert isinstance(layer, twin.torchs)
    assert isinstance(layer, nn.modules.lazy.LazyModuleMixin)
    layer(twin.input())
    assert type(layer) is SIZED[twin.spec.name, twin.dim].ours
    assert not isinstance(layer, nn.modules.lazy.LazyModuleMixin)


@each_variant
def test_after_the_first_input_it_is_the_layer_built_for_that_size(twin):
    lazy = twin.layer()
    sized = SIZED[twin.spec.name, twin.dim]
    plain = sized.ours(CHANNELS, **twin.options)
    with nk.backend("torch"):
        for training in (True, False):
            lazy.train(training), plain.train(training)
            x, upstream = twin.input(), torch.randn(twin.shape())
            assert_same(step(lazy, x, upstream), step(plain, x, upstream))
    assert repr(lazy) == repr(plain)
    assert {*dict(lazy.named_buffers())} == {*dict(plain.named_buffers())}


@each_variant
def test_before_the_first_input_the_state_is_torchs(twin):
    ours, torchs = twin.layer(), twin.torchs(**twin.options)
    mine, other = ours.state_dict(), torchs.state_dict()
    assert {name: type(value) for name, value in mine.items()} == {name: type(value) for name, value in other.items()}
    assert repr(ours) == repr(torchs)
    assert {type(value) for value in mine.values()} <= {UninitializedParameter, UninitializedBuffer, torch.Tensor}
    ours.reset_parameters()  # as torch's: nothing to do yet
    torchs.reset_parameters()
    assert all(is_lazy(p) for p in ours.parameters())


@each_lazy
def test_the_options_survive(twin):
    options = {"activation": nn.PReLU(init=0.5), "backend": "torch", "low_precision_buffers": True}
    layer = twin.layer(momentum=None, eps=1e-3, **options)
    x = twin.input()
    y = layer(x, residual=x)  # the first call may have a residual
    plain = SIZED[twin.spec.name, twin.dim].ours(
        CHANNELS, affine=True, track_running_stats=True, momentum=None, eps=1e-3, **copy.deepcopy(options)
    )
    assert y.equal(plain(x, residual=x))
    assert repr(layer) == repr(plain)
    assert layer.low_precision_buffers
    assert layer.bfloat16().running_mean.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@each_lazy
def test_a_narrow_lazy_layer_has_wide_statistics(twin, dtype):
    layer = twin.layer(dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert layer.running_mean.dtype == layer.running_var.dtype == wide
    assert layer(twin.input(dtype=dtype)).dtype == dtype
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert layer.running_mean.dtype == layer.running_var.dtype == wide
    assert layer.running_var.isfinite().all()


@each_lazy
def test_without_bias_there_is_none_afterwards(twin):
    layer = twin.layer(bias=False)
    assert [*layer.state_dict()] == ["weight", "running_mean", "running_var", "num_batches_tracked"]
    layer(twin.input())
    assert layer.bias is None
    assert layer.weight.shape == (CHANNELS,)


@each_lazy
def test_a_first_input_of_the_wrong_shape_is_refused(twin):
    with pytest.raises(ValueError, match=r"expected .*D input"):
        twin.layer()(twin.input()[None, None])


@pytest.mark.parametrize("from_lazy", [False, True], ids=["from_a_sized_layer", "from_a_lazy_layer"])
@each_lazy
def test_checkpoints_load_before_the_first_input(twin, from_lazy):
    sized = SIZED[twin.spec.name, twin.dim].torchs(CHANNELS, affine=True, track_running_stats=True)
    sized(twin.input())
    layer = twin.layer()
    layer.load_state_dict(twin.torchs().state_dict() if from_lazy else sized.state_dict())
    x = twin.input()
    y = layer.eval()(x)
    assert layer.num_features == CHANNELS
    if not from_lazy:
        with nk.backend("torch"):
            assert layer(x).equal(sized.eval()(x))
    assert y.shape == x.shape


@each_lazy
def test_a_lazy_layer_survives_pickling(twin):
    layer = pickle.loads(pickle.dumps(twin.layer(activation="relu")))
    assert is_lazy(layer.weight)
    assert (layer(twin.input()) >= 0).all()


@each_lazy
def test_the_first_evaluation_learns_the_size_and_moves_nothing(twin):
    layer = twin.layer().eval()
    layer(twin.input())
    assert not layer.training
    assert layer.running_mean.equal(torch.zeros(CHANNELS))
    assert layer.num_batches_tracked.item() == 0


@each_lazy
def test_lazy_layers_inside_a_model_become_sized_by_one_forward(twin):
    model = nn.Sequential(nn.Identity(), nn.Sequential(twin.layer(activation="silu")))
    optimizer_refuses = any(is_lazy(p) for p in model.parameters())
    model(twin.input())
    assert optimizer_refuses
    assert not any(is_lazy(p) for p in model.parameters())
    assert [name for name, _ in model.named_modules()][-1].endswith("activation")
