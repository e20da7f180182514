"""Plain torch.fx.symbolic_trace takes a layer as one call, and what the other tracers of torch do with one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import normkit as nk
from cases import CASES, FORMS, Form
from twins import TWINS, assert_same, off_scale, step

ORDINARY = CASES[0]
each_form = pytest.mark.parametrize("form", FORMS, ids=str)


@pytest.fixture(autouse=True)
def _torchs_operators():
    """A kernel that takes the activation with it rounds otherwise than the two calls of a graph."""
    with nk.backend("torch"):
        yield


class Net(nn.Module):
    """Two uses of norms: alone, and with a residual that is the first argument's neighbour."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.first = form.layer(ORDINARY, activation="relu")
        self.inner = nn.Sequential(form.layer(ORDINARY, activation=nn.PReLU()))
        self.last = form.layer(ORDINARY)

    def forward(self, x):  # fx cannot pickle annotations that are strings
        y = self.inner(self.first(x))
        return self.last(input=y, residual=x * 2)


def called(traced: fx.GraphModule) -> list[tuple[str, str]]:
    return [(n.op, str(n.target)) for n in traced.graph.nodes if n.op.startswith("call_")]


@each_form
def test_a_model_is_traced_with_its_layers_as_calls(form):
    traced = fx.symbolic_trace(Net(form))
    modules = [target for op, target in called(traced) if op == "call_module"]
    assert modules == ["first", "inner.0", "last"]
    assert [type(traced.get_submodule(name)) for name in modules] == [type(form.layer(ORDINARY))] * 3
    last = next(node for node in traced.graph.nodes if node.target == "last")
    assert "residual" in last.kwargs


@pytest.mark.parametrize("traced_while", ["training", "evaluating"])
@each_form
def test_the_traced_model_is_right_in_training_and_in_evaluation(form, traced_while):
    model = Net(form).train(traced_while == "training")
    traced = pickle.loads(pickle.dumps(fx.symbolic_trace(copy.deepcopy(model))))
    for training in (True, False, True):
        model.train(training), traced.train(training)
        x = ORDINARY.input(form, torch.float32)
        upstream = torch.randn(x.shape)
        got, wanted = step(traced, x, upstream), step(model, x, upstream)
        assert {*got} == {*wanted}
        assert_same({name: got[name] for name in wanted}, wanted)


@each_form
def test_hooks_run_once_with_the_call_and_not_in_the_graph(form):
    model = Net(form)
    model.first.register_forward_pre_hook(lambda layer, inputs: (inputs[0] + 1,))
    model.first.register_forward_hook(lambda layer, inputs, output: 2 * output)
    traced = fx.symbolic_trace(model)
    assert len(called(traced)) == 4  # three layers and the multiplication in forward
    model.eval(), traced.eval()
    x = ORDINARY.input(form, torch.float32)
    assert traced(x).equal(model(x))


class Watching(fx.Tracer):
    """Keeps the name of the module that every node was made in, as torchvision's feature extraction does."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[str] = []
        self.names: dict[str, str] = {}

    def call_module(self, m, forward, args, kwargs):
        self.inside.append(self.path_of_module(m))
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self.inside.pop()

    def create_node(self, kind, target, *rest, **kwargs):
        if kind == "call_module":
            self.names[target] = self.inside[-1]
        return super().create_node(kind, target, *rest, **kwargs)


@each_form
def test_a_tracer_that_follows_modules_sees_the_layer(form):
    tracer = Watching()
    tracer.trace(Net(form))
    assert tracer.names == {name: name for name in ("first", "inner.0", "last")}


@pytest.mark.parametrize("twin", TWINS, ids=str)
def test_a_layer_traced_by_itself_goes_as_torchs_goes(twin):
    """torch's batch and instance norm check the number of axes, which fx cannot follow."""
    ours, torchs = twin.pair()
    if twin.spec.name in ("batch_norm", "instance_norm"):
        errors = []
        for layer in (ours, torchs):
            with pytest.raises(fx.proxy.TraceError, match="control flow") as caught:
                fx.symbolic_trace(layer)
            errors.append(str(caught.value))
        assert errors[0] == errors[1]
        return
    assert isinstance(fx.symbolic_trace(torchs), fx.GraphModule)
    x, residual = twin.input(), twin.input()
    traced = fx.symbolic_trace(ours)
    assert traced(x).equal(ours(x))
    assert traced(x, residual=residual).equal(ours(x, residual=residual))


TRACKS = ("batch_norm", "instance_norm", "switchable_norm", "evonorm_b0", "power_norm")


@pytest.mark.parametrize("form", [form for form in FORMS if form.name not in TRACKS], ids=str)
def test_a_layer_traced_by_itself_keeps_its_activation(form):
    layer = form.layer(ORDINARY, activation=nn.PReLU())
    traced = fx.symbolic_trace(layer)
    assert ("call_module", "activation") in called(traced)
    x = ORDINARY.input(form, torch.float32)
    assert traced(x).equal(layer(x))


RUNNING = {"running_mean": torch.linspace(-1.0, 1.0, 6), "running_var": torch.linspace(0.5, 2.0, 6)}
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]] = {
    "batch_norm in evaluation": (
        nk.functional.batch_norm,
        lambda x: nk.functional.batch_norm(x, *RUNNING.values(), activation="relu"),
    ),
    "batch_norm in training": (
        nk.functional.batch_norm,
        lambda x: nk.functional.batch_norm(x, *RUNNING.values(), training=True, momentum=0.5),
    ),
    "instance_norm": (nk.functional.instance_norm, lambda x: nk.functional.instance_norm(x, activation=F.hardtanh)),
    "group_norm": (nk.functional.group_norm, lambda x: nk.functional.group_norm(x, 3, residual=x * 2)),
    "layer_norm": (nk.functional.layer_norm, lambda x: nk.functional.layer_norm(x, (4,), backend="torch")),
    "rms_norm": (nk.functional.rms_norm, lambda x: nk.functional.rms_norm(x, (6,), channels_first=True)),
    "dyt": (nk.functional.dyt, lambda x: nk.functional.dyt(x, torch.full((1,), 0.5), activation="gelu")),
    "derf": (nk.functional.derf, lambda x: nk.functional.derf(x, torch.full((1,), 0.5), torch.ones(1))),
    "filter_response_norm": (
        nk.functional.filter_response_norm,
        lambda x: nk.functional.filter_response_norm(x, activation="relu"),
    ),
    "power_norm": (nk.functional.power_norm, lambda x: nk.functional.power_norm(x, torch.ones(6))),
    "global_response_norm": (nk.functional.global_response_norm, lambda x: nk.functional.global_response_norm(x)),
    "evonorm_s0": (nk.functional.evonorm_s0, lambda x: nk.functional.evonorm_s0(x, 3, torch.ones(6))),
    "evonorm_b0 in training": (
        nk.functional.evonorm_b0,
        lambda x: nk.functional.evonorm_b0(x, *RUNNING.values(), torch.ones(6), training=True),
    ),
    "switchable_norm in evaluation": (
        nk.functional.switchable_norm,
        lambda x: nk.functional.switchable_norm(x, *RUNNING.values(), torch.ones(3), torch.ones(3)),
    ),
    "identity": (nk.functional.identity, lambda x: nk.functional.identity(x, activation=torch.relu)),
}


def test_every_functional_form_is_traced_here():
    assert {function.__name__ for function, _ in FUNCTIONS.values()} == {*nk.functional.__all__}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_functional_form_is_one_call_as_torchs_are(name):
    function, use = FUNCTIONS[name]
    before = {key: value.clone() for key, value in RUNNING.items()}
    traced = fx.symbolic_trace(use)
    assert {key: value.tolist() for key, value in RUNNING.items()} == {k: v.tolist() for k, v in before.items()}
    assert sum(node.target is function for node in traced.graph.nodes) == 1
    assert len(called(traced)) == 1 + (name in ("instance_norm", "identity", "group_norm"))
    x = off_scale((5, 6, 4), 1)
    wanted = use(x)
    moved = {key: value.clone() for key, value in RUNNING.items()}
    for key, value in RUNNING.items():
        value.copy_(before[key])
    assert traced(x).equal(wanted)
    assert {key: value.tolist() for key, value in RUNNING.items()} == {k: v.tolist() for k, v in moved.items()}
    for key, value in RUNNING.items():
        value.copy_(before[key])


@each_form
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_scripting_is_refused_with_a_sentence(form):
    sentence = f"{type(form.layer(ORDINARY)).__name__} cannot be scripted: .*\n.*torch.compile.*torch.export"
    for module in (form.layer(ORDINARY), nn.Sequential(nn.ReLU(), nn.Sequential(form.layer(ORDINARY)))):
        with pytest.raises(RuntimeError, match=sentence):
            torch.jit.script(module)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@each_form
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # torch's own instance norm gives it too
def test_torch_jit_trace_works_in_the_mode_it_was_traced_in(form, training):
    layer = form.layer(ORDINARY, activation="silu", backend="torch").train(training)
    other = copy.deepcopy(layer)
    x = ORDINARY.input(form, torch.float32)
    other(x)  # tracing runs the layer once
    traced = torch.jit.trace(layer, x, check_trace=False)
    for _ in range(2):
        x = ORDINARY.input(form, torch.float32)
        assert traced(x).equal(other(x))
    state = dict(traced.named_buffers())
    assert all(state[name].equal(buffer) for name, buffer in other.named_buffers())
