"""A drop-in is one: torch's class, constructor, state and numbers, with nothing to notice but the new options."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import normkit as nk
from cases import CASES, FORMS
from normkit.kernels import limits
from normkit.vocabulary.spec import REGISTRY
from twins import CHANNELS, KEYWORD, LAZY, TRACKING, TWINS, VARIANTS, Twin, assert_same, away_from_one, off_scale, step

STEPS = 4
EPS32 = torch.finfo(torch.float32).eps

each_twin = pytest.mark.parametrize("twin", TWINS, ids=str)
each_variant = pytest.mark.parametrize("twin", VARIANTS, ids=str)
each_tracking = pytest.mark.parametrize("twin", TRACKING, ids=str)
each_form = pytest.mark.parametrize("form", FORMS, ids=str)
ORDINARY = CASES[0]
CHOICES = ("auto", "torch")


@pytest.fixture(autouse=True)
def _torchs_operators():
    """Bit for bit is a promise of the torch backend; what the others may differ by is in test_parity.py."""
    with nk.backend("torch"):
        yield


@pytest.fixture
def kernels_for_all_sizes(monkeypatch):
    """By default small inputs go to torch's operators, and what the kernels say to a wrong one would not show."""
    monkeypatch.setattr(limits, "torch_is_faster", lambda *call: False)


def test_every_norm_says_whether_it_has_a_twin():
    assert {twin.spec.name for twin in TWINS} == {n for n, family in REGISTRY.items() if family.spec.twin is not None}
    assert len(TWINS) >= 10
    assert len(LAZY) >= 6


@pytest.mark.parametrize("twin", [*TWINS, *LAZY], ids=str)
def test_it_is_torchs_class(twin):
    assert issubclass(twin.ours, twin.torchs)
    assert twin.ours.__name__ == twin.torchs.__name__
    assert getattr(nk, twin.ours.__name__) is twin.ours
    assert twin.ours._version == twin.torchs._version


def test_the_ecosystem_finds_batch_norms():
    for dim in (1, 2, 3):
        assert isinstance(nk.create("batch", CHANNELS, dim=dim), nn.modules.batchnorm._BatchNorm)
        assert isinstance(nk.create("instance", CHANNELS, dim=dim), nn.modules.instancenorm._InstanceNorm)


@pytest.mark.parametrize("twin", [*TWINS, *LAZY], ids=str)
def test_the_constructor_has_torchs_order_names_and_defaults(twin):
    ours, torchs = (inspect.signature(cls).parameters for cls in (twin.ours, twin.torchs))

    def positional(parameters):
        return [(p.name, p.kind, p.default) for p in parameters.values() if p.kind is not KEYWORD]

    assert positional(ours) == positional(torchs)
    for name, parameter in torchs.items():
        assert ours[name].default == parameter.default
    assert {"activation", "backend"} <= {p.name for p in ours.values() if p.kind is KEYWORD}


@pytest.mark.parametrize("name", sorted({twin.spec.name for twin in TWINS} & {*dir(F)}))
def test_the_functional_form_has_torchs_order_names_and_defaults(name):
    """But for the first argument, which is x here and input there."""
    ours, torchs = (inspect.signature(getattr(module, name)).parameters.values() for module in (nk.functional, F))
    positional = [(p.name, p.default) for p in ours if p.kind is not KEYWORD]
    assert positional[1:] == [(p.name, p.default) for p in torchs][1:]
    assert {"activation", "residual", "backend"} <= {p.name for p in ours if p.kind is KEYWORD}
    assert (positional[0][0], next(iter(torchs)).name) == ("x", "input")


@pytest.mark.parametrize("twin", [t for t in TWINS if t.spec.name not in ("rms_norm", "identity")], ids=str)
def test_bias_is_accepted_by_name_on_every_version_of_torch(twin):
    affine = {"affine": True} if "affine" in inspect.signature(twin.ours).parameters else {}
    layer = twin.layer(bias=False, **affine)
    assert layer.bias is None
    assert layer.weight is not None
    assert "bias" not in layer.state_dict()


@each_variant
def test_state_dict_has_the_same_keys_dtypes_and_versions(twin):
    ours, torchs = twin.pair()
    mine, other = ours.state_dict(), torchs.state_dict()
    assert list(mine) == list(other)
    assert mine._metadata == other._metadata
    for name, value in mine.items():
        assert (value.dtype, value.shape) == (other[name].dtype, other[name].shape)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("from_torch", [False, True], ids=["to_torch", "from_torch"])
@each_variant
def test_checkpoints_load_strictly_in_both_directions(twin, from_torch, assign):
    ours, torchs = twin.pair()
    source, target = (torchs, ours) if from_torch else (ours, torchs)
    for _ in range(2):
        source(twin.input())
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.copy_(away_from_one(parameter))
    checkpoint = copy.deepcopy(source.state_dict())
    assert str(target.load_state_dict(checkpoint, strict=True, assign=assign)) == "<All keys matched successfully>"
    assert_same(target.state_dict(), source.state_dict())
    x, upstream = twin.input(), torch.randn(twin.shape())
    assert_same(step(target, x, upstream), step(source, x, upstream))


@pytest.mark.parametrize("metadata", ["version_1", "none"])
@each_tracking
def test_a_checkpoint_from_before_num_batches_tracked_loads_strictly(twin, metadata):
    ours, torchs = twin.pair()
    torchs(twin.input())
    checkpoint = torchs.state_dict()
    del checkpoint["num_batches_tracked"]
    if metadata == "none":
        checkpoint = dict(checkpoint)
    else:
        checkpoint._metadata[""]["version"] = 1
    ours.load_state_dict(copy.deepcopy(checkpoint), strict=True)
    assert ours.num_batches_tracked.item() == 0
    assert_same({name: ours.state_dict()[name] for name in checkpoint}, dict(checkpoint))


@each_variant
def test_statistics_for_a_layer_that_keeps_none_are_refused_as_torch_does(twin):
    ours, torchs = twin.pair()
    checkpoint = dict(torchs.state_dict()) | {"running_mean": torch.zeros(CHANNELS)}
    outcomes = [outcome(lambda layer=layer: layer.load_state_dict(dict(checkpoint))) for layer in (ours, torchs)]
    assert outcomes[0] == outcomes[1]
    assert (outcomes[0] is None) == twin.tracks


@each_variant
def test_the_text_is_torchs_as_long_as_no_option_is_used(twin):
    ours, torchs = twin.pair()
    assert repr(ours) == repr(torchs)


@each_form
def test_options_are_seen_in_the_text(form):
    layer = form.layer(ORDINARY, activation="silu", backend="torch")
    assert "backend='torch'" in repr(layer)
    assert "(activation): SiLU()" in repr(layer)


@each_variant
def test_the_numbers_are_torchs_bit_for_bit(twin):
    ours, torchs = twin.pair()
    optimizers = [
        torch.optim.SGD(layer.parameters(), lr=0.1) if [*layer.parameters()] else None for layer in (ours, torchs)
    ]
    for _ in range(STEPS):
        x, upstream = twin.input(), torch.randn(twin.shape())
        assert_same(step(ours, x, upstream), step(torchs, x, upstream))
        for optimizer in filter(None, optimizers):
            optimizer.step()
    ours.eval(), torchs.eval()
    x, upstream = twin.input(), torch.randn(twin.shape())
    assert_same(step(ours, x, upstream), step(torchs, x, upstream))


@pytest.mark.parametrize("twin", [t for t in VARIANTS if t.dim == 1 and t.spec.name == "batch_norm"], ids=str)
def test_features_without_space_are_torchs_bit_for_bit(twin):
    ours, torchs = twin.pair()
    for training in (True, False):
        ours.train(training), torchs.train(training)
        x, upstream = off_scale((9, CHANNELS), 1), torch.randn(9, CHANNELS)
        assert_same(step(ours, x, upstream), step(torchs, x, upstream))


@pytest.mark.parametrize("twin", [t for t in VARIANTS if t.spec.name == "instance_norm"], ids=str)
def test_a_single_sample_without_its_axis_is_torchs_bit_for_bit(twin):
    ours, torchs = twin.pair()
    for training in (True, False):
        ours.train(training), torchs.train(training)
        x, upstream = twin.input()[0], torch.randn(twin.shape())[0]
        assert_same(step(ours, x, upstream), step(torchs, x, upstream))


@each_tracking
def test_momentum_none_is_the_average_over_all_batches(twin):
    """To rounding on any backend, two a step, of numbers as large as the batch's; test_accumulation.py has the bits."""
    ours, torchs = twin.pair(momentum=None)
    truth = {"running_mean": [], "running_var": []}
    for _ in range(STEPS):
        x = twin.input()
        ours(x), torchs(x)
        fresh = twin.torchs(*twin.required(), **{**twin.options, "momentum": 1.0})
        fresh(x)
        for name, values in truth.items():
            values.append(getattr(fresh, name))
            bound = 2 * STEPS * EPS32 * torch.stack(values).abs().amax(0)
            assert ((getattr(ours, name) - getattr(torchs, name)).abs() <= bound).all()
            if twin.mixes_samples:
                assert ((getattr(ours, name) - torch.stack(values).mean(0)).abs() <= 2 * bound).all()
    assert ours.num_batches_tracked.equal(torchs.num_batches_tracked)
    torchs.load_state_dict(ours.state_dict())
    ours.eval(), torchs.eval()
    assert ours(x).equal(torchs(x))


@each_tracking
def test_switching_tracking_off_later_means_what_it_means_in_torch(twin):
    """Some trainers freeze a batch norm by setting the attribute."""
    ours, torchs = twin.pair()
    for layer in (ours, torchs):
        layer.track_running_stats = False
    for training in (True, False):
        ours.train(training), torchs.train(training)
        x, upstream = twin.input(), torch.randn(twin.shape())
        assert_same(step(ours, x, upstream), step(torchs, x, upstream))


@pytest.mark.parametrize("momentum", [0.1, None])
@each_tracking
def test_a_layer_that_has_lost_its_counter_does_what_torchs_does(twin, momentum):
    ours, torchs = twin.pair(momentum=momentum)
    for layer in (ours, torchs):
        layer.num_batches_tracked = None
    x, upstream = twin.input(), torch.randn(twin.shape())
    assert_same(step(ours, x, upstream), step(torchs, x, upstream))
    assert ours.running_mean.equal(torch.zeros(CHANNELS)) == (momentum is None)


@pytest.mark.parametrize("choice", CHOICES)
@each_tracking
def test_a_training_step_before_the_backward_pass_of_an_evaluation_does_not_change_its_gradient(
    twin, choice, kernels_for_all_sizes
):
    """A deviation: torch's batch norm takes the statistics after the step, in silence; red here when torch mends it."""
    x, upstream, right = twin.input().requires_grad_(), torch.randn(twin.shape()), {}
    with nk.backend(choice):
        for layer in twin.pair():
            leaves = [x, *layer.parameters()]
            layer(x)
            wanted = torch.autograd.grad(layer.eval()(x), leaves, upstream)
            y = layer(x)
            layer.train()(3 * x)
            got = torch.autograd.grad(y, leaves, upstream)
            right[type(layer)] = all(mine.equal(other) for mine, other in zip(got, wanted, strict=True))
    assert right == {twin.ours: True, twin.torchs: twin.spec.name != "batch_norm"}


BAD_INPUTS: dict[str, Callable[[Twin], Tensor]] = {
    "one axis too few": lambda twin: twin.input()[0, 0],
    "two axes too many": lambda twin: twin.input()[None, None],
    "more channels": lambda twin: twin.input(channels=CHANNELS + 3),
    "channels that divide into no groups": lambda twin: twin.input(channels=CHANNELS + 1),
    "one value": lambda twin: torch.full((1, CHANNELS, *(1,) * twin.dim), 3.0),
    "one value per channel and sample": lambda twin: torch.full((2, CHANNELS, *(1,) * twin.dim), 3.0),
    "no axis": lambda twin: torch.tensor(3.0),
    "another dtype": lambda twin: twin.input(dtype=torch.float64),
    "integers": lambda twin: twin.input(dtype=torch.int64),
}


def outcome(call: Callable[[], Tensor]) -> tuple[type[Exception], str] | None:
    """What it raised; ``None``: nothing."""
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize("bad", BAD_INPUTS)
@each_variant
@pytest.mark.filterwarnings("ignore")  # which warnings there are has its own tests
def test_a_wrong_input_raises_torchs_exception_with_torchs_sentence(twin, bad, kernels_for_all_sizes):
    ours, torchs = twin.pair()
    x = BAD_INPUTS[bad](twin)
    for training, choice in itertools.product((True, False), CHOICES):
        ours.train(training), torchs.train(training)
        with nk.backend(choice):
            wanted, got = outcome(lambda: torchs(x)), outcome(lambda: ours(x))
        if wanted is None:
            assert got is None
        else:
            assert got is not None
            assert got[0] is wanted[0]
            assert wanted[1] in got[1]


@pytest.mark.parametrize("bad", BAD_INPUTS)
@pytest.mark.filterwarnings("ignore")
def test_every_wrong_input_is_refused_by_some_norm(bad):
    """Otherwise the test above would compare nothing with nothing."""
    assert any(outcome(lambda twin=twin: twin.layer()(BAD_INPUTS[bad](twin))) for twin in VARIANTS)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("eps", [0.0, -1.0])
@pytest.mark.parametrize("twin", [t for t in TWINS if hasattr(t.layer(), "eps")], ids=str)
def test_an_epsilon_that_is_not_positive_is_treated_as_torch_treats_it(twin, eps, choice, kernels_for_all_sizes):
    ours, torchs = twin.pair(eps=eps)
    x = twin.input()
    with nk.backend(choice):
        wanted, got = outcome(lambda: torchs(x)), outcome(lambda: ours(x))
    assert (got is None) == (wanted is None) == (twin.spec.name != "batch_norm")
    if wanted is None:
        assert_same({"output": ours(x)}, {"output": torchs(x)})
    else:
        assert (got[0], wanted[0]) == (ValueError, ValueError)
        assert wanted[1] in got[1]


def test_group_norm_lists_the_divisors():
    with pytest.raises(ValueError, match=r"num_channels \(48\) must be divisible by num_groups \(32\)") as caught:
        nk.GroupNorm(32, 48)
    with pytest.raises(ValueError) as torchs:
        nn.GroupNorm(32, 48)
    assert str(torchs.value) in str(caught.value)
    assert "1, 2, 3, 4, 6, 8, 12, 16, 24, 48" in str(caught.value)


@pytest.mark.parametrize("num_groups", [0, -2])
def test_a_number_of_groups_below_one_is_refused_at_once(num_groups):
    """A deviation: torch divides by zero, or finds out when the first input comes."""
    with pytest.raises(ValueError, match="divisors of 4"):
        nk.GroupNorm(num_groups, 4)


@pytest.mark.parametrize("batched", [True, False])
def test_instance_norm_warns_of_channels_that_it_does_not_use(batched):
    x = off_scale((2, 3, 4, 4), 1)
    x = x if batched else x[0]
    with pytest.warns(UserWarning, match="does not match num_features") as ours:
        y = nk.InstanceNorm2d(7)(x)
    with pytest.warns(UserWarning, match="does not match num_features") as torchs:
        wanted = nn.InstanceNorm2d(7)(x)
    assert [str(warning.message) for warning in ours] == [str(warning.message) for warning in torchs]
    assert y.equal(wanted)


EMPTY = {"no samples": (0, (7, 4, 3)), "no space": (5, (0, 4, 3)), "neither": (0, (0, 4, 3))}


@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@each_variant
def test_an_empty_batch_passes_and_moves_nothing(twin, training, empty):
    samples, space = EMPTY[empty]
    with nk.backend("auto"):
        assert twin.layer().train(training)(torch.empty(twin.shape(samples, space=space))).numel() == 0
    ours, torchs = twin.pair()
    ours.train(training), torchs.train(training)
    x = torch.empty(twin.shape(samples, space=space))
    before = {name: getattr(ours, name).clone() for name in ("running_mean", "running_var") if twin.tracks}
    got = step(ours, x, torch.empty_like(x))
    assert got["output"].shape == x.shape
    assert_same({name: got[name] for name in before}, before)
    if samples == 0:
        assert not any(value.any() for name, value in got.items() if name.startswith("gradient"))
    if twin.spec.name == "instance_norm" and samples == 0:  # a deviation: torch fails, or makes its statistics NaN
        if ours.weight is not None:
            assert outcome(lambda: torchs(x))[0] is IndexError
        elif twin.tracks and training:
            assert torchs(x).numel() == 0
            assert torchs.running_mean.isnan().all()
    else:
        assert_same(got, step(torchs, x, torch.empty_like(x)))


ROUND_TRIPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "deepcopy": copy.deepcopy,
    "torch.save": lambda layer: load(layer, weights_only=False),
}


def load(thing: object, *, weights_only: bool) -> object:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def used(form, **options) -> nn.Module:
    """A layer that has seen some data."""
    layer = form.layer(ORDINARY, **options)
    layer(ORDINARY.input(form, torch.float32))
    return layer


@pytest.mark.parametrize("trip", ROUND_TRIPS)
@each_form
def test_a_layer_survives(form, trip):
    layer = used(form, activation=nn.PReLU(), backend="torch")
    clone = ROUND_TRIPS[trip](layer)
    assert repr(clone) == repr(layer)
    assert {*dict(clone.named_buffers())} == {*dict(layer.named_buffers())}
    x = ORDINARY.input(form, torch.float32)
    upstream = torch.randn(x.shape)
    assert_same(step(clone, x, upstream), step(layer, x, upstream))
    tensors = [*layer.parameters(), *layer.buffers()], [*clone.parameters(), *clone.buffers()]
    assert not any(mine is its for mine, its in zip(*tensors, strict=True))


@each_form
def test_a_checkpoint_needs_nothing_but_torch_to_be_read(form):
    layer = used(form)
    checkpoint = load(layer.state_dict(), weights_only=True)
    fresh = form.layer(ORDINARY)
    fresh.load_state_dict(checkpoint)
    assert_same(fresh.state_dict(), layer.state_dict())


@each_variant
def test_functional_call_takes_other_parameters_and_moves_other_statistics(twin):
    ours, torchs = twin.pair()
    before = copy.deepcopy(ours.state_dict())
    x, seen = twin.input(), []
    state = {name: value.clone() for name, value in twin.pair()[0].state_dict().items()}
    for layer in (ours, torchs):
        own = {name: value.clone() for name, value in state.items()}
        seen.append({"output": torch.func.functional_call(layer, own, (x,)), **own})
    assert_same(*seen)
    assert_same(ours.state_dict(), before)


@each_variant
def test_a_layer_can_be_built_without_memory_and_filled_later(twin):
    ours = twin.ours(*twin.required(), **twin.options, **({} if twin.spec.name == "identity" else {"device": "meta"}))
    assert all(tensor.is_meta for tensor in (*ours.parameters(), *ours.buffers()))
    ours(twin.input(device="meta"))
    ours.to_empty(device="cpu")
    ours.reset_parameters()
    torchs = twin.torchs(*twin.required(), **twin.options)
    x, upstream = twin.input(), torch.randn(twin.shape())
    assert_same(step(ours, x, upstream), step(torchs, x, upstream))


@each_variant
def test_a_layer_can_be_shared_between_processes(twin):
    ours, torchs = twin.pair()
    ours.share_memory()
    assert all(tensor.is_shared() for tensor in (*ours.parameters(), *ours.buffers()))
    x, upstream = twin.input(), torch.randn(twin.shape())
    assert_same(step(ours, x, upstream), step(torchs, x, upstream))
    assert all(tensor.is_shared() for tensor in (*ours.parameters(), *ours.buffers()))


class OnePlus(nn.Module):
    """Weight as 1 + raw: what people parametrize a norm for."""

    def forward(self, raw: Tensor) -> Tensor:
        return 1.0 + raw


@pytest.mark.parametrize("twin", [t for t in VARIANTS if getattr(t.layer(), "weight", None) is not None], ids=str)
def test_the_weight_can_be_parametrized(twin):
    ours, torchs = twin.pair()
    for layer in (ours, torchs):
        parametrize.register_parametrization(layer, "weight", OnePlus())
    assert isinstance(ours, twin.ours)
    for training in (True, False):
        ours.train(training), torchs.train(training)
        x, upstream = twin.input(), torch.randn(twin.shape())
        assert_same(step(ours, x, upstream), step(torchs, x, upstream))
    assert ours.half().parametrizations.weight.original.dtype == torch.float16


@each_variant
def test_hooks_see_what_they_see_in_torch(twin):
    ours, torchs = twin.pair()
    seen: dict[nn.Module, list[Tensor]] = {ours: [], torchs: []}
    for layer in (ours, torchs):
        layer.register_forward_pre_hook(
            lambda layer, inputs: (seen[layer].append(inputs[0].detach()), (2 * inputs[0],))[1]
        )
        layer.register_forward_hook(lambda layer, inputs, output: (seen[layer].append(output.detach()), output + 1)[1])
        layer.register_full_backward_hook(lambda layer, inward, outward: seen[layer].extend((*inward, *outward)))
    x, upstream = twin.input(), torch.randn(twin.shape())
    assert_same(step(ours, x, upstream), step(torchs, x, upstream))
    assert len(seen[ours]) == 4
    assert all(mine.equal(other) for mine, other in zip(*seen.values(), strict=True))


@each_form
def test_apply_visits_the_layer_and_its_activation(form):
    layer = form.layer(ORDINARY, activation="relu")
    visited = []
    layer.apply(visited.append)
    assert visited == [layer.activation, layer]
    assert [name for name, _ in layer.named_modules()] == ["", "activation"]


@each_variant
def test_reset_parameters_starts_over(twin):
    ours, _ = twin.pair()
    ours(twin.input())
    ours.reset_parameters()
    assert_same(ours.state_dict(), twin.torchs(*twin.required(), **twin.options).state_dict())


@each_variant
def test_plain_use_warns_of_nothing(twin):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(twin.layer(), twin.input(), torch.randn(twin.shape()))
