"""What nk.accelerate_ leaves alone: every refusal is a sentence, and the model computes what it always did."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import normkit as nk
from hard_forwards import FROZEN, PARTLY, AsksForTheTypeOfItsInput, OnTheMode, Scaled
from written_models import BasicBlock, images


def both(model: nn.Module, x: Tensor) -> tuple[nk.Certificate, nn.Module]:
    """The certificate and the original, after comparing the outputs in training, evaluation and training again."""
    original = copy.deepcopy(model)
    certificate = nk.accelerate_(model)
    for training in (True, False, True):
        outputs = []
        for m in (model.train(training), original.train(training)):
            torch.manual_seed(3)
            random.seed(3)
            outputs.append(m(x.clone()))
        scale = 64 * torch.finfo(torch.float32).eps * float(outputs[1].detach().abs().max())
        assert torch.allclose(*outputs, rtol=0, atol=scale)
    for name, buffer in original.named_buffers():
        assert torch.allclose(dict(model.named_buffers())[name].double(), buffer.double(), rtol=1e-5), name
    return certificate, original


@pytest.mark.parametrize("kind", FROZEN, ids=lambda kind: kind.__name__)
def test_a_forward_that_a_graph_would_change_is_refused_by_name(kind):
    model = kind()
    certificate, _ = both(model, torch.randn(6, 4) * 3 + 2)
    (refusal,) = certificate.refused
    assert f"its forward {FROZEN[kind]}" in refusal.reason
    assert "forward" not in vars(model)
    assert isinstance(model.norm, nk.BatchNorm1d)
    assert not any(name.startswith("_tensor_constant") for name in vars(model))


def test_nothing_of_the_tracing_stays_behind():
    before = nn.Module.__setattr__
    nk.accelerate_(OnTheMode())
    assert nn.Module.__setattr__ is before
    assert "__getattribute__" not in vars(nn.Module)


def test_an_attribute_that_changes_later_is_heeded():
    model = Scaled()
    nk.accelerate_(model)
    assert "forward" in vars(model)
    x = torch.randn(6, 4) * 3 + 2
    before = model.eval()(x)
    model.offset = 5.0
    assert torch.equal(model(x), before + 5)


def test_an_input_is_a_tensor_or_the_forward_of_the_class_runs():
    model = AsksForTheTypeOfItsInput()
    certificate, original = both(model, torch.randn(6, 4) * 3 + 2)
    assert certificate.refused == ()
    pair = [torch.randn(6, 4), torch.randn(5, 4)]
    assert torch.allclose(model(pair), original(pair), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", PARTLY, ids=lambda kind: kind.__name__)
def test_a_step_that_somebody_would_miss_stays_a_step(kind):
    certificate, _ = both(kind(), torch.randn(6, 4) * 3 + 2)
    reasons = [row.reason for row in certificate.refused]
    assert len(reasons) == 1
    assert PARTLY[kind] in reasons[0]


class OwnNorm(nn.LayerNorm):
    def forward(self, input):
        return super().forward(input).neg()


def replaced() -> nn.Module:
    module = nn.BatchNorm2d(3)
    module.forward = lambda x: x
    return module


def parametrized() -> nn.Module:
    class Doubled(nn.Module):
        def forward(self, weight):
            return weight * 2

    module = nn.LayerNorm(3)
    parametrize.register_parametrization(module, "weight", Doubled())
    return module


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (OwnNorm(3), "is a subclass of LayerNorm and may compute something else"),
        (nn.SyncBatchNorm(3), "normkit has no layer in the place of SyncBatchNorm"),
        (nn.LazyBatchNorm2d(), "run one batch through the model first"),
        (replaced(), "its forward has been replaced on the object"),
        (parametrized(), "it has parametrizations"),
        (nn.LocalResponseNorm(2), "normkit has no layer in the place of LocalResponseNorm"),
        (nk.GroupNorm(1, 3), "it is normkit's already"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_layer_that_stays_is_skipped_with_its_reason(layer, reason):
    kind = type(layer)
    certificate = nk.accelerate_(nn.Sequential(nn.Conv2d(3, 3, 1), layer))
    assert type(layer) is kind
    (skipped,) = [row for row in certificate.skipped if row.module == "1"]
    assert reason in skipped.reason


def test_a_compiled_model_is_refused():
    block = BasicBlock(3, 3)
    with pytest.raises(TypeError, match=r"compiled already[^\n]*\n  do it before torch\.compile"):
        nk.accelerate_(torch.compile(block, backend="eager"))
    block.compile(backend="eager")
    with pytest.raises(TypeError, match="compiled already"):
        nk.accelerate_(nn.Sequential(block))
    assert type(block.bn1) is nn.BatchNorm2d


def test_data_parallel_and_things_that_are_no_modules_are_refused():
    with pytest.raises(TypeError, match="use DistributedDataParallel"):
        nk.accelerate_(nn.DataParallel(BasicBlock(3, 3)))
    with pytest.raises(TypeError, match=r"function is not a torch\.nn\.Module"):
        nk.accelerate_(lambda x: x)


def test_distributed_data_parallel_is_looked_through_and_shards_are_refused():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        block = BasicBlock(3, 3)
        original = copy.deepcopy(block)
        wrapped = nn.parallel.DistributedDataParallel(block)
        certificate = nk.accelerate_(wrapped, example_inputs=images())
        assert {row.module for row in certificate.changed} == {"bn1", "bn2", ""}
        upstream = torch.randn(5, 3, 12, 10)
        wrapped(images()).backward(upstream)
        torch.manual_seed(0)
        assert all(p.grad is not None for p in block.parameters())
        assert list(block.state_dict()) == list(original.state_dict())

        from torch.distributed.fsdp import fully_shard

        with pytest.raises(TypeError, match="sharded by FSDP"):
            nk.accelerate_(fully_shard(BasicBlock(3, 3), mesh=torch.distributed.init_device_mesh("cpu", (1,))))
    finally:
        torch.distributed.destroy_process_group()
