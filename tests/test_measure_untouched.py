"""A model that is measured is bit for bit what it was, and trains on as if nobody had looked."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import normkit as nk
from measured_models import MODELS
from normkit.measure import QUANTITIES, activation_drift, explosion_rate, internal_covariate_shift, landscape, measure
from normkit.measure.untouched import untouched
from normkit.surgery import batches


def bits(value: Any) -> Any:
    return value.detach().clone().flatten().view(torch.uint8).tolist() if isinstance(value, torch.Tensor) else value


def state(model: nn.Module) -> dict[str, Any]:
    """All that could be told apart: objects, values, versions, modes, attributes, hooks, random numbers."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            found[f"{name} {key}"] = (id(value), len(value) if isinstance(value, dict) else None)
        if isinstance(generator := vars(module).get("generator"), torch.Generator):
            found[f"{name} draws"] = generator.get_state().tolist()
        if (hold := vars(module).get("hold")) is not None:
            waiting = {key: [bits(t) for t in one.moments] for key, one in (hold.pending or {}).items()}
            found[f"{name} waits"] = (id(hold.pending), hold.frozen, hold.reference, waiting)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found[name] = (id(tensor), tensor._version, tensor.requires_grad, tensor.dtype, tensor.stride(), bits(tensor))
        found[f"{name}.grad"] = (id(tensor.grad), bits(tensor.grad))
    numpy = np.random.get_state()  # noqa: NPY002  of the generator that models use
    found["random"] = (torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2])
    found["switches"] = (torch.is_grad_enabled(), torch.is_autocast_cache_enabled(), torch.is_inference_mode_enabled())
    return found


def differences(before: dict, after: dict) -> list[str]:
    return [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]


def build(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]()


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def everything(model: nn.Module, batch: Any, loss: Any) -> list:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return measure(model, batch, loss_fn=loss, optimizer=optimizer)


def pass_by(model: nn.Module, batch: Any, loss: Any) -> torch.Tensor:
    """A step's forward pass, as a user writes it."""
    output = batches.call(model, pytree.tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, batch))
    return loss(output, batch[1] if isinstance(batch, tuple) else batch)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_the_model_changes(name, training):
    model, batch, loss = build(name)
    pass_by(model, batch, loss).backward()
    if not training:
        model.eval()
    before, given = state(model), bits_of(batch)
    readings = everything(model, batch, loss)
    assert differences(before, state(model)) == []
    assert bits_of(batch) == given
    assert {reading.quantity for reading in readings} >= {"gradient_norm", "loss_training", "train_eval_gap"}


def bits_of(batch: Any) -> list:
    return [bits(leaf) for leaf in pytree.tree_leaves(batch)]


def test_a_pass_that_is_under_way_goes_on(name):
    """Between forward and backward: what autograd has saved must still be there, unmodified."""
    gradients = []
    for watched in (False, True):
        model, batch, loss = build(name)
        under_way = pass_by(model, batch, loss)
        if watched:
            everything(model, batch, loss)
        under_way.backward()
        gradients.append({name: bits(p.grad) for name, p in model.named_parameters()})
    assert gradients[0] == gradients[1]


def test_a_measured_run_is_the_run_that_nobody_measured(name):
    def train(watched: bool) -> list:
        model, batch, loss = build(name)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            pass_by(model, batch, loss).backward()
            if watched:
                everything(model, batch, loss)
            optimizer.step()
        return [bits(t) for t in model.state_dict().values()]

    assert train(watched=True) == train(watched=False)


PROBES = {
    "internal_covariate_shift": internal_covariate_shift,
    "landscape": landscape,
    "activation_drift": activation_drift,
}


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("name", ["torch batch norm", "normkit batch norm", "words", "remembers", "parametrized"])
def test_theory_probes_put_the_weights_back(name, probe):
    model, batch, loss = build(name)
    pass_by(model, batch, loss).backward()
    before = state(model)
    assert PROBES[probe](model, batch, loss_fn=loss, lr=0.3) or probe == "activation_drift"
    assert differences(before, state(model)) == []


def test_the_explosion_rate_leaves_the_model_alone():
    model, batch, loss = build("torch batch norm")
    model.insert(1, nn.Sigmoid())
    before = state(model)
    explosion_rate(model, batch)
    explosion_rate(model, batch, loss_fn=loss)
    assert differences(before, state(model)) == []


@pytest.mark.parametrize("name", ["torch batch norm", "normkit batch norm", "shared", "words"])
def test_an_error_on_the_way_leaves_the_model_alone(name):
    model, batch, _ = build(name)
    before = state(model)

    def fails(output, target):
        raise ArithmeticError("planned")

    with pytest.raises(ArithmeticError, match="planned"):
        measure(model, batch, loss_fn=fails)
    assert differences(before, state(model)) == []


@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode])
def test_gradients_are_there_also_where_they_are_switched_off(switch):
    model, batch, loss = build("normkit batch norm")
    plain = everything(model, batch, loss)
    before = state(model)
    with switch():
        assert everything(model, batch, loss) == plain
    assert differences(before, state(model)) == []


def test_under_autocast_the_weights_that_training_finds_cast_still_have_gradients():
    model, batch, loss = build("torch batch norm")
    with torch.autocast("cpu", torch.bfloat16):
        readings = measure(model, batch, loss_fn=loss)
        before = state(model)
        measure(model, batch)
        assert differences(before, state(model)) == []
        pass_by(model, batch, loss).backward()
    norms = {r.module: r.value for r in readings if r.quantity == "gradient_norm"}
    for name, parameter in model.named_parameters():
        assert norms[name] > 0
        assert parameter.grad is not None


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # that dynamo asks for
@pytest.mark.parametrize("how", ["model", "part", "in place"])
def test_a_compiled_model_is_measured_uncompiled_and_not_compiled_anew(how):
    model, batch, loss = build("shared")
    compiled = []
    torch.compiler.reset()

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    if how == "model":
        seen = torch.compile(model, backend=backend)
    elif how == "part":
        model.norm, seen = torch.compile(model.norm, backend=backend), model
    else:
        model.compile(backend=backend)
        seen = model
    pass_by(seen, batch, loss).backward()
    number = len(compiled)
    assert number
    if how != "part":  # whose names have a part more
        twin, _, _ = build("shared")
        pass_by(twin, batch, loss)
        assert everything(seen, batch, loss) == everything(twin, batch, loss)
    before = state(seen)
    everything(seen, batch, loss)
    assert differences(before, state(seen)) == []
    pass_by(seen, batch, loss).backward()
    assert len(compiled) == number


def test_hooks_of_the_user_stay_and_those_of_the_measurement_go():
    model, batch, _ = build("torch batch norm")
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    measure(model, batch)
    assert calls
    assert [len(module._forward_hooks) for module in model.modules()].count(1) == 1
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_wrapped_model_is_measured_as_the_model_that_it_wraps():
    model, batch, loss = build("torch batch norm")
    wrapped = nn.DataParallel(model)
    before = state(wrapped)
    assert everything(wrapped, batch, loss) == everything(model, batch, loss)
    assert differences(before, state(wrapped)) == []


def test_lazy_parameters_are_refused_in_words():
    with pytest.raises(ValueError, match=r"no shape yet.*\n.*run the model on one batch first"):
        measure(nn.Sequential(nn.LazyLinear(3)), torch.randn(2, 3))


def test_every_stage_is_measured_of_some_model():
    model, batch, loss = build("normkit batch norm")
    found = {QUANTITIES[reading.quantity].stage for reading in everything(model, batch, loss)}
    assert found == {"model", "batch", "gradients"}
    assert nk.BatchNorm2d in {type(module) for module in model.modules()}


def test_two_threads_that_measure_leave_the_compiler_as_it_was():
    """The stance of the compiler is one per process: whoever comes last must not put back what the first had set."""
    torch.compiler.reset()
    compiled = []
    first, second = untouched(nn.Linear(2, 2)), untouched(nn.Linear(2, 2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    torch.compile(nn.Linear(2, 2), backend=lambda graph, inputs: compiled.append(graph) or graph.forward)(torch.ones(2))
    assert compiled
