"""nk.accelerate_ keeps what other code holds on to: objects, names, modes, hooks, copies; and it can be taken back."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn

import normkit as nk
from same_training import EPS, assert_same, note_calls, observe
from written_models import MODELS, BasicBlock, UNetBlock, images, make


@pytest.fixture
def calls(monkeypatch) -> list[tuple[bool, bool]]:
    return note_calls(monkeypatch)


@pytest.mark.parametrize("name", MODELS)
def test_names_objects_keys_and_modes_stay(name):
    model, x = make(name)
    model.train()
    next(model.children()).eval()
    keys, parameters = list(model.state_dict()), list(model.parameters())
    modules, buffers = list(model.modules()), list(model.named_buffers())
    modes = [module.training for module in modules]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    nk.accelerate_(model, example_inputs=x)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(dict(model.named_buffers())[name] is buffer for name, buffer in buffers)
    assert [module.training for module in modules] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    make(name)[0].load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(make(name)[0].state_dict(), strict=True)


def test_twice_equals_once():
    model, x = make("unet")
    nk.accelerate_(model, example_inputs=x)
    programs = [vars(m).get("forward") for m in model.modules()]
    again = nk.accelerate_(model, example_inputs=x)
    assert again.changed == ()
    assert len(again.skipped) == 9 + 5
    assert [vars(m).get("forward") for m in model.modules()] == programs


@pytest.mark.parametrize("name", MODELS)
def test_undo_is_exact_and_keeps_what_was_learnt(name):
    model, x = make(name)
    fresh = [(type(m), set(vars(m)), set(m._buffers), set(m._non_persistent_buffers_set)) for m in model.modules()]
    original = copy.deepcopy(model)
    certificate = nk.accelerate_(model, example_inputs=x)
    observe(model, x, True)
    learnt = {key: value.clone() for key, value in model.state_dict().items()}
    certificate.undo()
    now = [(type(m), set(vars(m)), set(m._buffers), set(m._non_persistent_buffers_set)) for m in model.modules()]
    assert now == fresh
    assert all(torch.equal(value, learnt[key]) for key, value in model.state_dict().items())
    original.load_state_dict(learnt)
    assert torch.equal(model.eval()(x), original.eval()(x))
    with pytest.raises(RuntimeError, match="already taken back"):
        certificate.undo()


def test_undo_refuses_when_somebody_has_changed_the_same_place():
    model, _ = make("resnet")
    certificate = nk.accelerate_(model)
    del model.layer1[0].forward
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(RuntimeError, match=r"layer1\.0: its forward has been replaced since"):
        certificate.undo()
    assert [type(m) for m in model.modules()] == kinds


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_is_accelerated_and_is_a_copy(copied, calls):
    model, x = make("resnet")
    nk.accelerate_(model)
    other = copied(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert_same(other, copy.deepcopy(model), x, True, False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    calls.clear()
    other(x)
    assert sum(residual for residual, _ in calls) == 4


def test_torch_save_keeps_the_acceleration(calls):
    model, x = make("unet")
    nk.accelerate_(model, example_inputs=x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    calls.clear()
    assert torch.equal(loaded(x), model(x))
    assert len(calls) == 18
    assert calls.count((False, True)) == 18


def test_a_deleted_model_is_freed_at_once():
    model, _ = make("resnet")
    nk.accelerate_(model)
    gc.collect()
    gc.disable()
    try:
        watch = weakref.ref(model.layer1[0])
        del model
        assert watch() is None
    finally:
        gc.enable()


def test_tools_that_look_at_the_signature_see_that_of_the_class():
    block = UNetBlock(4, 4)
    expected = inspect.signature(block.forward)
    nk.accelerate_(block)
    assert inspect.signature(block.forward) == expected


def test_an_exported_program_holds_operators_of_torch_only():
    model, x = make("resnet")
    nk.accelerate_(model, example_inputs=x)
    program = torch.export.export(model.eval(), (x,))
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert operators
    assert all(operator.startswith("aten.") for operator in operators)
    assert torch.allclose(program.module()(x), model(x), rtol=64 * EPS, atol=1e-5)


def test_fx_sees_the_layers_of_an_accelerated_model():
    model, x = make("resnet")
    nk.accelerate_(model)
    graph_module = torch.fx.symbolic_trace(model)
    targets = {node.target for node in graph_module.graph.nodes if node.op == "call_module"}
    assert {"layer1.0.bn2", "layer1.0.relu"} <= targets
    assert torch.allclose(graph_module.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_a_hook_registered_afterwards_sees_what_it_always_saw():
    model, x = make("resnet")
    original = copy.deepcopy(model)
    nk.accelerate_(model)
    seen: list[Tensor] = []
    for m in (model, original):
        m.layer1[0].bn1.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
        m.eval()(x)
    assert len(seen) == 2
    assert seen[1].min() < 0  # not yet through the ReLU
    assert torch.allclose(seen[0], seen[1], rtol=64 * EPS, atol=64 * EPS * float(seen[1].abs().max()))


def test_a_hook_on_a_chain_that_was_taken_apart_sees_what_it_always_saw(calls):
    model, x = make("sequence")
    nk.accelerate_(model)
    seen: list[Tensor] = []
    model.body.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    model.eval()(x)
    assert (seen[0] - model.body(x)).abs().max() <= 64 * EPS * seen[0].abs().max()
    assert calls[0] == (False, False)


def test_a_hook_on_all_modules_sees_what_it_always_saw():
    model, x = make("resnet")
    nk.accelerate_(model)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        model(x)
    finally:
        handle.remove()
    assert sum(isinstance(m, nn.BatchNorm2d) for m in seen) == 13
    assert sum(isinstance(m, nn.ReLU) for m in seen) == 5


def test_hooks_that_are_there_already_are_kept_and_nothing_is_fused_around_them():
    block = BasicBlock(3, 3)
    seen: list[Tensor] = []
    block.bn2.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    certificate = nk.accelerate_(block)
    (refusal,) = certificate.refused
    assert "bn2 has hooks" in refusal.reason
    block(images())
    assert seen[0].min() < 0


def test_a_layer_put_in_later_is_the_one_that_runs():
    model, x = make("resnet")
    original = copy.deepcopy(model)
    nk.accelerate_(model)
    for m in (model, original):
        torch.manual_seed(1)
        m.layer1[0].bn2 = nn.Conv2d(8, 8, 1)
        m.layer2[0].norm1 = nn.SyncBatchNorm.convert_sync_batchnorm(m.layer2[0].norm1)
        m.layer1[1].relu = nn.ELU()
    assert torch.allclose(model.eval()(x), original.eval()(x), rtol=1e-4, atol=1e-5)


def test_a_layer_appended_later_runs():
    stack = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU())
    nk.accelerate_(stack)
    stack.append(nn.Linear(4, 2))
    assert stack(torch.rand(5, 3)).shape == (5, 2)


def test_half_precision_buffers_and_autocast_stay_as_they_were():
    model = make("resnet")[0].bfloat16()
    types = [(name, buffer.dtype) for name, buffer in model.named_buffers()]
    nk.accelerate_(model, example_inputs=images().bfloat16())
    assert [(n, b.dtype) for n, b in model.named_buffers() if n in model.state_dict()] == types
    assert all(b.dtype == torch.bfloat16 for n, b in model.named_buffers() if "running" in n)
    assert all(b.dtype == torch.bfloat16 for n, b in model.to(torch.bfloat16).named_buffers() if "running" in n)
    model, x = make("resnet")
    nk.accelerate_(model)  # and normkit's own rule for the rest: what is float32 stays so
    assert all(b.dtype == torch.float32 for n, b in model.bfloat16().named_buffers() if "running" in n)
    model, x = make("transformer")
    original = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        nk.accelerate_(model, example_inputs=x)
        ours, theirs = model(x), original(x)
    assert ours.dtype == theirs.dtype
    unit = torch.finfo(torch.bfloat16).eps
    assert (ours - theirs).abs().max() <= 8 * unit * theirs.abs().max()  # 8 layers, each rounds once


def test_trainability_and_several_names_stay():
    model = nn.ModuleDict({"a": nn.BatchNorm2d(3), "b": nn.Sequential(nn.Conv2d(3, 3, 1))})
    model["b"].append(model["a"])
    model["same"] = model["a"]
    model["a"].weight.requires_grad_(False)
    certificate = nk.accelerate_(model)
    assert model["a"] is model["same"] is model["b"][1]
    assert isinstance(model["a"], nk.BatchNorm2d)
    assert not model["a"].weight.requires_grad
    assert len(certificate.changed) == 1
