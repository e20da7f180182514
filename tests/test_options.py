"""The options that torch does not have: activation, residual, backend, channels_first. Each means the steps by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normkit as nk
from cases import CASES, FORMS, Form, channels_last
from normkit.dispatch import BACKENDS
from normkit.epilogue import ACTIVATIONS
from normkit.vocabulary.spec import REGISTRY
from twins import off_scale

ORDINARY = CASES[0]
each_form = pytest.mark.parametrize("form", FORMS, ids=str)
each_backend = pytest.mark.parametrize("backend", BACKENDS)

BY_HAND: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
}
GIVEN: dict[str, object] = {
    **{name: name for name in ACTIVATIONS},
    "class": nn.Softsign,
    "module": nn.LeakyReLU(0.3),
    "module with parameters": nn.PReLU(),
    "None": None,
}


def by_hand(activation: object) -> Callable[[Tensor], Tensor]:
    if activation is None:
        return lambda y: y
    if isinstance(activation, str):
        return BY_HAND[activation]
    return activation() if isinstance(activation, type) else copy.deepcopy(activation)


def inputs(form: Form, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Input, residual and upstream gradient; the residual is as large as what it is added to."""
    x = ORDINARY.input(form, dtype)
    return x.requires_grad_(), (2 * torch.randn(x.shape) - 1).to(dtype).requires_grad_(), torch.randn(x.shape).to(dtype)


def gradients(y: Tensor, upstream: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, leaves, upstream))


def test_every_name_has_its_meaning_by_hand():
    assert BY_HAND.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "alone"])
@each_form
def test_options_are_the_three_steps_by_hand(form, given, with_residual):
    activation = GIVEN[given]
    layer = form.layer(ORDINARY, activation=copy.deepcopy(activation), backend="torch")
    plain = copy.deepcopy(layer)
    plain.activation = None
    x, residual, upstream = inputs(form)
    step = by_hand(activation)
    if isinstance(step, nn.Module):
        step.load_state_dict(layer.activation.state_dict())

    y = layer(x, residual=residual) if with_residual else layer(x)
    wanted = step(plain(x) + residual if with_residual else plain(x))
    assert y.equal(wanted)

    leaves = [x, residual] if with_residual else [x]
    own = [*leaves, *layer.parameters()]
    others = [*leaves, *plain.parameters(), *(step.parameters() if isinstance(step, nn.Module) else ())]
    pairs = zip(gradients(y, upstream, *own), gradients(wanted, upstream, *others), strict=True)
    assert all(mine.equal(other) for mine, other in pairs)


@pytest.mark.parametrize("form", [form for form in FORMS if form.spec.over is not None], ids=str)
def test_an_activation_may_work_in_place(form):
    layer = form.layer(ORDINARY, activation=nn.ReLU(inplace=True), backend="torch")
    other = copy.deepcopy(layer)
    other.activation = nn.ReLU()
    x, _, upstream = inputs(form)
    leaves = [x, *layer.parameters()], [x, *other.parameters()]
    pairs = [gradients(m(x), upstream, *own) for m, own in zip((layer, other), leaves, strict=True)]
    assert all(mine.equal(its) for mine, its in zip(*pairs, strict=True))


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_the_functional_forms_have_the_same_options(name):
    form = next(form for form in FORMS if form.name == name and form.dim == 2)
    layer = form.layer(ORDINARY, activation="gelu", backend="torch").eval()
    x, residual, _ = inputs(form)
    arguments = {
        "batch_norm": lambda m: (m.running_mean, m.running_var, m.weight, m.bias),
        "instance_norm": lambda m: (m.running_mean, m.running_var, m.weight, m.bias, False),
        "group_norm": lambda m: (m.num_groups, m.weight, m.bias),
        "layer_norm": lambda m: (m.normalized_shape, m.weight, m.bias),
        "rms_norm": lambda m: (m.normalized_shape, m.weight),
        "dyt": lambda m: (m.alpha, m.weight, m.bias),
        "derf": lambda m: (m.alpha, m.shift, m.weight, m.bias),
        "filter_response_norm": lambda m: (m.weight, m.bias),
        "power_norm": lambda m: (m.running_square, m.weight, m.bias),
        "global_response_norm": lambda m: (m.weight, m.bias),
        "evonorm_s0": lambda m: (m.num_groups, m.v, m.weight, m.bias),
        "evonorm_b0": lambda m: (m.running_mean, m.running_var, m.v, m.weight, m.bias),
        "switchable_norm": lambda m: (*(m.running_mean, m.running_var, m.mean_logits, m.var_logits, m.weight, m.bias),),
        "identity": lambda m: (),
    }[name](layer)
    options = {"backend": "torch", **({"channels_first": True} if getattr(layer, "channels_first", False) else {})}
    function = getattr(nk.functional, name)
    assert function(x, *arguments, activation="gelu", residual=residual, **options).equal(layer(x, residual=residual))
    bare = function(x, *arguments, **options)
    assert function(x, *arguments, activation=torch.tanh, residual=residual, **options).equal(
        torch.tanh(bare + residual)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_form
def test_a_residual_promotes_as_addition_does(form, dtype):
    layer = form.layer(ORDINARY, activation="silu", dtype=dtype, backend="torch")
    plain = copy.deepcopy(layer)
    plain.activation = None
    x, residual, upstream = inputs(form, dtype)
    wide = residual.detach().float().requires_grad_()
    y, wanted = layer(x, residual=wide), F.silu(plain(x) + wide)
    assert y.dtype == torch.float32
    assert y.equal(wanted)
    pairs = zip(gradients(y, upstream.float(), x, wide), gradients(wanted, upstream.float(), x, wide), strict=True)
    assert all(mine.equal(other) and mine.dtype == other.dtype for mine, other in pairs)


@each_form
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # torch's own rms_norm
def test_autocast_changes_what_it_changes_by_hand(form):
    """The input comes out of a matrix product in bfloat16 and the residual past it in float32: a residual network."""
    layer = form.layer(ORDINARY, activation="relu", backend="torch")
    plain = copy.deepcopy(layer)
    plain.activation = None
    x, residual, _ = inputs(form)
    product = nn.Linear(x.shape[-1], x.shape[-1])
    upstream = torch.randn(x.shape)
    with torch.autocast("cpu", torch.bfloat16):
        assert product(x).dtype == torch.bfloat16
        y = layer(product(x), residual=residual)
        wanted = F.relu(plain(product(x)) + residual)
    assert y.dtype == wanted.dtype
    assert y.equal(wanted)
    pairs = [
        gradients(out, upstream.to(out.dtype), x, residual, product.weight, *model.parameters())
        for out, model in ((y, layer), (wanted, plain))
    ]
    assert all(mine.equal(other) for mine, other in zip(*pairs, strict=True))


@each_form
def test_the_activation_is_a_child_that_others_can_see(form):
    module = nn.RReLU()
    layer = form.layer(ORDINARY, activation=module)
    assert layer.activation is module
    assert dict(layer.named_children()) == {"activation": module}
    assert not layer.eval().activation.training
    assert layer.train().activation.training
    seen = []
    module.register_forward_hook(lambda *call: seen.append(call))
    layer(ORDINARY.input(form, torch.float32))
    assert len(seen) == 1


@each_form
def test_parameters_of_the_activation_are_parameters_of_the_layer(form):
    layer = form.layer(ORDINARY, activation=nn.PReLU(init=0.5))
    assert layer.state_dict()["activation.weight"].shape == (1,)
    fresh = form.layer(ORDINARY, activation=nn.PReLU)
    fresh.load_state_dict(layer.state_dict())
    assert fresh.activation.weight.equal(layer.activation.weight)


@each_form
def test_names_and_none_add_nothing_to_the_checkpoint(form):
    keys = [*form.layer(ORDINARY).state_dict()]
    assert [*form.layer(ORDINARY, activation="gelu", backend="torch").state_dict()] == keys


@each_form
def test_an_unknown_activation_is_refused_with_the_nearest(form):
    with pytest.raises(ValueError, match=r"no activation named 'ReLu6'.*\n.*did you mean 'relu'"):
        form.layer(ORDINARY, activation="ReLu6")
    with pytest.raises(TypeError, match=r"neither a name nor a module"):
        form.layer(ORDINARY, activation=torch.relu)
    with pytest.raises(TypeError, match=r"neither a name nor a module"):
        form.layer(ORDINARY, activation=0.1)


@each_backend
@each_form
def test_a_residual_of_another_shape_is_refused_even_where_it_would_broadcast(form, backend):
    layer = form.layer(ORDINARY, backend=backend)
    x = ORDINARY.input(form, torch.float32)
    for residual in (x[..., :1], x[:1], x[None], x.flatten()):
        with pytest.raises(ValueError, match=r"the residual has the shape .*, the input"):
            layer(x, residual=residual)


@each_form
def test_an_unknown_backend_is_refused_with_the_nearest(form):
    with pytest.raises(ValueError, match=r"no backend named 'Torch'.*\n.*did you mean 'torch'"):
        form.layer(ORDINARY, backend="Torch")
    with pytest.raises(ValueError, match="no backend named 'cuda'"), nk.backend("cuda"):
        pass


def test_a_layers_own_backend_goes_before_the_surrounding_one_and_that_before_the_order():
    layer, own = nk.LayerNorm(6), nk.LayerNorm(6, backend="torch")
    x = off_scale((5, 6), 1)
    first = nk.explain(layer, x).backend
    with nk.backend("reference"):
        assert nk.explain(layer, x).backend == "reference"
        assert nk.explain(own, x).backend == "torch"
        with nk.backend("torch"):
            assert nk.explain(layer, x).backend == "torch"
        assert nk.explain(layer, x).backend == "reference"
        assert layer(x).equal(nk.functional.layer_norm(x, (6,), backend="reference"))
        assert own(x).equal(F.layer_norm(x, (6,)))
    with pytest.raises(KeyError), nk.backend("reference"):
        raise KeyError
    assert nk.explain(layer, x).backend == first


CHANNELS_FIRST = [form for form in FORMS if form.options.get("channels_first")]


@pytest.mark.parametrize("form", CHANNELS_FIRST, ids=str)
def test_channels_first_is_permuting_by_hand(form):
    """The same arithmetic on the same rows; a weight's gradient is summed in another order: an error per term."""
    layer = form.layer(ORDINARY, backend="torch")
    last = next(f for f in FORMS if (f.name, f.dim, f.trailing) == (form.name, form.dim, 1)).layer(
        ORDINARY, backend="torch"
    )
    last.load_state_dict(layer.state_dict())
    for stored in (lambda x: x, channels_last):
        x = stored(ORDINARY.input(form, torch.float32)).requires_grad_()
        upstream = torch.randn(x.shape)
        y, wanted = layer(x), last(x.movedim(1, -1)).movedim(-1, 1)
        assert y.equal(wanted)
        assert y.stride() == x.stride()
        leaves = [x, *layer.parameters()], [x, *last.parameters()]
        for mine, other in zip(
            gradients(y, upstream, *leaves[0]), gradients(wanted, upstream, *leaves[1]), strict=True
        ):
            terms = x.numel() / mine.numel()
            bound = (1 + terms) * torch.finfo(torch.float32).eps * other.abs().max()
            assert ((mine - other).abs() <= bound).all()


@pytest.mark.parametrize("form", CHANNELS_FIRST, ids=str)
def test_channels_first_adds_the_residual_in_the_same_place(form):
    layer = form.layer(ORDINARY, activation="relu", backend="torch")
    plain = copy.deepcopy(layer)
    plain.activation = None
    x, residual, _ = inputs(form)
    assert layer(x, residual=residual).equal(F.relu(plain(x) + residual))


@pytest.mark.parametrize("cls", [nk.LayerNorm, nk.RMSNorm, nk.DyT])
def test_channels_first_is_one_axis(cls):
    with pytest.raises(ValueError, match=r"channels_first=True normalises over one axis.*\n.*\(4, 6\)"):
        cls((4, 6), channels_first=True)
    assert "channels_first=True" in repr(cls(6, channels_first=True))
    assert "channels_first" not in repr(cls(6))


def test_the_functional_forms_refuse_channels_first_over_several_axes():
    x = off_scale((5, 6, 4), 1)
    for function in (nk.functional.layer_norm, nk.functional.rms_norm):
        with pytest.raises(ValueError, match="over one axis"):
            function(x, (6, 4), channels_first=True)


def test_channels_first_takes_features_without_space():
    x = off_scale((5, 6), 1)
    for cls in (nk.LayerNorm, nk.RMSNorm, nk.DyT):
        assert cls(6, channels_first=True, backend="torch")(x).equal(cls(6, backend="torch")(x))
