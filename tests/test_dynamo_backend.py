"""torch.compile(model, backend="normkit"): the same model, whatever way it was written, with its norms fused."""

from __future__ import annotations

import copy
import inspect
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normkit as nk
from hard_forwards import PARTLY, DropoutByHand, OnTheMode
from normkit import fusion
from normkit.fusion import FUNCTIONS
from normkit.integrations.torch_compile import normkit
from normkit.vocabulary.spec import REGISTRY
from same_training import assert_same
from written_models import MODELS, make

# torch's own, when Inductor is imported
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
ROOT = Path(__file__).parent.parent


class Recorder:
    """The backend, and the graphs as it left them."""

    def __init__(self, **options) -> None:
        self.options = options
        self.graphs: list[torch.fx.Graph] = []

    def __call__(self, graph_module, example_inputs):
        compiled = normkit(graph_module, example_inputs, options=self.options)
        self.graphs.append(graph_module.graph)
        return compiled

    def fused(self) -> int:
        """The calls of the first graph that take something in."""
        return sum(bool({"residual", "activation"} & set(node.kwargs)) for node in self.graphs[0].nodes)

    def left(self) -> list[object]:
        return [node.target for graph in self.graphs for node in graph.nodes if node.target in FUNCTIONS]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


WAYS = [
    pytest.param(name, inner, marks=pytest.mark.slow if inner == "aot_eager" and "resnet" in name else ())
    for name in MODELS
    for inner in ("eager", "aot_eager")
]


@pytest.mark.parametrize(("name", "inner"), WAYS)
def test_outputs_gradients_and_buffers_are_the_same_in_every_mode(name, inner):
    model, x = make(name)
    original = copy.deepcopy(model)
    recorder = Recorder(inner=inner)
    model.compile(backend=recorder, fullgraph=True)
    assert_same(model, original, x, True, False, True)
    assert recorder.fused() == MODELS[name][2]
    assert recorder.left() == []


@pytest.mark.slow
def test_inductor_runs_the_rest():
    model, x = make("unet")
    original = copy.deepcopy(model)
    model.compile(backend=normkit, options={"inner": "inductor"})
    assert_same(model, original, x, True, False)


@pytest.mark.parametrize("kind", PARTLY, ids=lambda kind: kind.__name__)
def test_a_step_that_somebody_would_miss_stays_a_step(kind):
    model = kind()
    recorder = Recorder()
    original = copy.deepcopy(model)
    model.compile(backend=recorder, fullgraph=True)
    x = torch.randn(6, 4) * 3 + 2
    for training in (True, False, True):
        expected = original.train(training)(x.clone())
        error = (model.train(training)(x.clone()) - expected).detach().abs().max()
        assert error <= 64 * torch.finfo(torch.float32).eps * expected.detach().abs().max()
    for (name, ours), theirs in zip(model.named_buffers(), original.buffers(), strict=True):
        assert torch.allclose(ours.double(), theirs.double(), rtol=1e-5), name


@pytest.mark.parametrize("kind", [OnTheMode, DropoutByHand], ids=lambda kind: kind.__name__)
def test_what_depends_on_the_mode_is_captured_once_for_each(kind):
    """accelerate_ refuses these; Dynamo guards on the mode."""
    model = kind()
    original = copy.deepcopy(model)
    recorder = Recorder()
    model.compile(backend=recorder, fullgraph=True)
    x = torch.randn(6, 4) * 3 + 2
    for training in (True, False, True):
        torch.manual_seed(5)
        expected = original.train(training)(x)
        torch.manual_seed(5)
        got = model.train(training)(x)
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert len(recorder.graphs) == 2
    assert all(any("activation" in node.kwargs for node in graph.nodes) for graph in recorder.graphs)


def test_sizes_that_vary_do_not_make_a_graph_each():
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU())
    original = copy.deepcopy(model)
    recorder = Recorder()
    compiled = torch.compile(model, backend=recorder, dynamic=True, fullgraph=True)
    for length in (9, 12, 17):
        x = torch.randn(5, 3, length) * 3 + 2
        assert torch.allclose(compiled(x), original(x), rtol=1e-4, atol=1e-5)
    assert len(recorder.graphs) == 1
    assert recorder.fused() == 1


def test_a_broadcast_residual_is_added_as_it_was():
    def function(x, r):
        return F.relu(F.layer_norm(x, (4,)) + r)

    recorder = Recorder()
    compiled = torch.compile(function, backend=recorder, fullgraph=True)
    x, r = torch.randn(6, 4) * 3 + 1, torch.randn(4)
    assert torch.allclose(compiled(x, r), function(x, r), rtol=1e-5, atol=1e-6)
    assert recorder.fused() == 0


def test_an_accelerated_model_compiles():
    model, x = make("resnet")
    original = copy.deepcopy(model)
    nk.accelerate_(model)
    model.compile(backend=Recorder(), fullgraph=True)
    assert_same(model, original, x, True, False)


def test_torch_finds_the_backend_by_its_name():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, attribute = project["entry-points"]["torch_dynamo_backends"]["normkit"].partition(":")
    assert getattr(import_module(module), attribute) is normkit


def test_an_unknown_inner_backend_is_refused_with_those_there_are():
    with pytest.raises(Exception, match=r"no inner backend 'fast'\.\n  choose from: .*inductor"):
        torch.compile(nn.ReLU(), backend=normkit, options={"inner": "fast"})(torch.rand(2))


def test_options_that_nobody_would_read_are_refused():
    with pytest.raises(Exception, match=r"has no use for options\['max_autotune'\]"):
        torch.compile(nn.ReLU(), backend=normkit, options={"max_autotune": True})(torch.rand(2))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_the_two_functions_take_the_same_arguments_in_the_same_order(function):
    theirs = list(inspect.signature(function).parameters.values())
    ours = [p for p in inspect.signature(FUNCTIONS[function]).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    assert [p.name for p in theirs][1:] == [p.name for p in ours][1:]
    assert [p.default for p in theirs] == [p.default for p in ours]


def test_every_norm_of_torch_that_normkit_has_is_in_the_table():
    names = {name for name, family in REGISTRY.items() if family.spec.over is not None and hasattr(F, name)}
    assert {function.__name__ for function in fusion.FUNCTIONS} == names
