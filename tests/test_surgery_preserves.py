"""What every operation leaves as it was: one test per item, over all operations that change a model in place."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import normkit as nk
from normkit.vocabulary.certificate import Certificate

Operation = Callable[..., Certificate]


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(6, 3, 6, 6, generator=generator) * 2 + 1 for _ in range(2)]


OPERATIONS: dict[str, Operation] = {
    "accelerate_": nk.accelerate_,
    "calibrate_": lambda model, **options: nk.calibrate_(model, data(), **options),
    "convert_ carried": lambda model, **options: nk.convert_(model, "group:2", **options),
    "convert_ matched": lambda model, **options: nk.convert_(model, "group:2", match=data(), **options),
    "freeze_": nk.freeze_,
    "sync_": nk.sync_,
}
NO_OPTIMIZER = {"calibrate_"}
"""It touches buffers alone."""
each_operation = pytest.mark.parametrize("name", OPERATIONS)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


def learnt(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + (0.5 if name == "running_var" else 0.2))
    return layer


@each_operation
def test_both_names_of_a_module_that_is_registered_twice(name):
    model = network()
    model.add_module("again", model[1])
    model.forward = lambda x: model[4](model[3](model[2](model[1](model[0](x)))))
    OPERATIONS[name](model)
    assert model.again is model[1]
    assert {"1.weight", "again.weight"} <= set(model.state_dict())


@each_operation
def test_ties_across_parents(name):
    shared = nn.BatchNorm2d(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(shared), nn.Conv2d(4, 4, 1), nn.Sequential(shared))
    OPERATIONS[name](model)
    assert model[1][0] is model[3][0]
    assert model[1][0].weight is model[3][0].weight
    weights = network()
    weights[4].weight = weights[1].weight
    OPERATIONS[name](weights)
    assert weights[4].weight is weights[1].weight


@each_operation
def test_a_model_that_is_the_layer_itself(name):
    layer = learnt(nn.BatchNorm2d(3))
    holder = nn.Sequential(layer)
    certificate = (
        nk.convert_(layer, "group:3", match=data())
        if name == "convert_ matched"
        else nk.convert_(layer, "group:3")
        if name == "convert_ carried"
        else OPERATIONS[name](layer)
    )
    assert len(certificate.changed) >= 1
    assert certificate.changed[0].module == ""
    assert holder[0] is layer


@each_operation
@pytest.mark.parametrize("mode", [True, False])
def test_the_mode_of_every_module(name, mode):
    model = network().train(mode)
    model[2].train(not mode)
    if name != "calibrate_":  # to which a layer in evaluation, in a model in training, is frozen
        model[4].train(not mode)
    modes = [module.training for module in model.modules()]
    OPERATIONS[name](model)
    assert [module.training for module in model.modules()][: len(modes)] == modes


@each_operation
def test_type_and_place_of_every_parameter(name):
    model = network()
    model[1].to(torch.float64)
    model[0].to(torch.float64)
    model[2] = nn.Identity()
    cast = nn.Module()
    cast.forward = lambda x: x.float()
    model.insert(2, cast)
    before = {n: (p.dtype, p.device) for n, p in model.named_parameters()}
    if name in ("calibrate_", "convert_ matched"):
        wide = [x.double() for x in data()]
        operate = (
            (lambda: nk.calibrate_(model, wide))
            if name == "calibrate_"
            else (lambda: nk.convert_(model, "group:2", match=wide))
        )
        operate()
    else:
        OPERATIONS[name](model)
    assert {n: (p.dtype, p.device) for n, p in model.named_parameters()} == before


@each_operation
def test_what_trains_and_what_does_not(name):
    model = network()
    model[1].weight.requires_grad = False
    model[3].bias.requires_grad = False
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    OPERATIONS[name](model)
    now = {n: p.requires_grad for n, p in model.named_parameters()}
    if name == "freeze_":  # what it is for
        now |= {n: before[n] for n in ("1.weight", "1.bias", "4.weight", "4.bias")}
    assert now == before


@each_operation
def test_hooks(name):
    model, seen = network(), []
    kinds = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
    for kind in kinds:
        getattr(model[1], f"register_{kind}")(lambda *_, kind=kind: seen.append(kind))
    OPERATIONS[name](model)
    seen.clear()
    model.eval()
    model(data()[0].requires_grad_()).square().sum().backward()
    assert sorted(seen) == sorted(kinds)


@each_operation
def test_parametrizations_are_refused_or_left_and_never_lost(name):
    model = network()
    nn.utils.parametrize.register_parametrization(model[1], "weight", nn.Softplus())
    if name == "freeze_":
        with pytest.raises(TypeError, match=r"(?s)1: it has parametrizations; remove them"):
            OPERATIONS[name](model)
    else:
        certificate = OPERATIONS[name](model)
        if name != "calibrate_":  # it has no business with weights
            rows = {row.module: row.reason for row in (*certificate.refused, *certificate.skipped)}
            assert "parametriz" in rows["1"] or "Parametrized" in rows["1"]
    assert nn.utils.parametrize.is_parametrized(model[1], "weight")


@each_operation
def test_the_keys_of_the_state_dict_or_how_they_have_changed(name):
    model = network()
    before = list(model.state_dict())
    certificate = OPERATIONS[name](model)
    kept = [key for key in before if key not in certificate.keys.removed]
    assert [key for key in model.state_dict() if key not in certificate.keys.added] == kept
    assert bool(certificate.keys.removed) == name.startswith("convert_")
    if name.startswith("convert_"):
        assert {key.partition(".")[2] for key in certificate.keys.removed} == {
            "running_mean",
            "running_var",
            "num_batches_tracked",
        }
        assert "the state_dict is without 1.running_mean, 1.running_var, 1.num_batches_tracked ... (6 in all)" in repr(
            certificate
        )
        assert certificate.to_json()["keys"]["removed"] == list(certificate.keys.removed)


@each_operation
def test_the_state_of_an_optimizer(name):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(data()[0]).square().sum().backward()
    optimizer.step()
    before = {n: optimizer.state[p]["momentum_buffer"] for n, p in model.named_parameters()}
    OPERATIONS[name](model, **({} if name in NO_OPTIMIZER else {"optimizer": optimizer}))
    assert all(optimizer.state[p]["momentum_buffer"] is before[n] for n, p in model.named_parameters())
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}


@each_operation
def test_undo_restores_the_state_dict_bit_for_bit(name):
    model = network()
    learnt(model[1])
    learnt(model[4])
    kinds = [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    objects = {n: id(p) for n, p in model.named_parameters()} | {n: id(b) for n, b in model.named_buffers()}
    certificate = OPERATIONS[name](model)
    assert certificate.changed
    certificate.undo()
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [type(module) for module in model.modules()] == kinds
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert {n: id(p) for n, p in model.named_parameters()} | {n: id(b) for n, b in model.named_buffers()} == objects
    with pytest.raises(RuntimeError, match="already taken back"):
        certificate.undo()


@each_operation
def test_twice_is_once(name):
    model = network()
    OPERATIONS[name](model)
    after = {key: value.clone() for key, value in model.state_dict().items()}
    assert OPERATIONS[name](model).changed == ()
    assert all(torch.equal(value, after[key]) for key, value in model.state_dict().items())


@each_operation
def test_a_plan_says_what_will_be_done_and_does_nothing(name):
    model = network()
    original = copy.deepcopy(model)
    planned = OPERATIONS[name](model, dry_run=True)
    assert planned.operation.endswith("(planned)")
    assert [type(module) for module in model.modules()] == [type(module) for module in original.modules()]
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), original.state_dict().values(), strict=True)
    )
    done = OPERATIONS[name](model)
    assert done.changed == planned.changed
    assert repr(planned).splitlines()[0].replace(" (planned)", "") == done.verdict


@each_operation
def test_the_model_can_be_copied_pickled_and_trained(name):
    model = network()
    OPERATIONS[name](model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.eval()
        torch.testing.assert_close(twin(data()[0]), model.eval()(data()[0]))
        if name != "sync_":  # which wants processes in training
            twin.train()(data()[0]).sum().backward()


def test_plan_takes_operations_alone():
    model = network()
    assert nk.plan(nk.convert_, model, to="layer").verdict == "convert_ (planned): 2 x BatchNorm2d becomes LayerNorm."
    assert nk.plan(nk.convert_, model, "layer").to_json() == nk.convert_(model, "layer", dry_run=True).to_json()
    with pytest.raises(TypeError, match=r"(?s)plan: 'create' is no operation on a model.*whose name ends in _"):
        nk.plan(nk.create, model)
    with pytest.raises(TypeError, match="plan: 'convert_' is no operation on a model"):
        nk.plan("convert_", model)
