"""Devices that no test here has: what is made beside a tensor is made where it is, and what a GPU does otherwise."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import normkit as nk
from normkit.blocks.recurrent_padding import Ends
from normkit.kernels import triton
from normkit.loop import readings
from normkit.measure.running import runner
from normkit.strategies import Freeze, attach
from normkit.surgery import merge, probe
from normkit.vocabulary.reading import Reading


def devices(module: nn.Module) -> set[str]:
    return {t.device.type for t in (*module.parameters(), *module.buffers())}


@pytest.mark.parametrize(
    ("old", "to"),
    [
        (nn.InstanceNorm2d(8), "batch"),
        (nn.GroupNorm(2, 8, affine=False), "switchable"),
        (nn.LayerNorm(8, elementwise_affine=False), "dyt"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_norm_without_tensors_becomes_one_where_the_model_is(old, to):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), old).to("meta", torch.bfloat16)
    nk.convert_(model, to=to)
    assert devices(model[1]) <= {"meta"}
    assert {p.dtype for p in model[1].parameters()} <= {torch.bfloat16}


@pytest.mark.parametrize("layer", [nk.GroupNorm, nk.RMSNorm], ids=lambda kind: kind.__name__)
def test_the_oracle_computes_where_the_input_is(layer):
    own = layer(8, device="meta") if layer is nk.RMSNorm else layer(2, 8, device="meta")
    with nk.backend("reference"):
        assert own(torch.empty(4, 8, device="meta")).device.type == "meta"


@pytest.mark.parametrize("layer", [nk.BatchNorm1d, nk.LayerNorm], ids=lambda kind: kind.__name__)
def test_a_mask_that_is_elsewhere_is_refused_with_where_it_belongs(layer):
    own = layer(8, device="meta")
    x = torch.empty((4, 8, 5) if layer is nk.BatchNorm1d else (4, 5, 8), device="meta")
    with pytest.raises(ValueError, match=r"the mask is on cpu, the input on meta.\n  move it there"):
        own(x, mask=torch.ones(4, 5, dtype=torch.bool))


def test_group_norm_keeps_channels_last_where_torchs_operator_does_not(monkeypatch):
    """On a GPU it makes its input contiguous."""
    own = F.group_norm
    monkeypatch.setattr(F, "group_norm", lambda *given: own(*given).contiguous())
    x = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last)
    y = nk.GroupNorm(2, 8, backend="torch")(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert nk.GroupNorm(2, 8, backend="torch")(x.contiguous()).is_contiguous()


def test_a_loss_gets_its_target_where_the_output_is():
    """Loaders give both on the CPU, and only the input goes to the model by itself."""
    model, seen = nn.Linear(3, 2, device="meta"), []
    loss = lambda output, target: seen.append(target["label"].device.type) or output.sum()
    there = lambda model, batch: model(batch[0].to("meta"))
    runner(loss, there)(model, (torch.randn(4, 3), {"label": torch.zeros(4)}))
    assert seen == ["meta"]


def test_processes_agree_on_readings_where_the_model_is(monkeypatch):
    class Sent(Exception):
        pass

    def sent(tensor, *_):
        raise Sent(tensor.device.type)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", sent)
    model = nn.Linear(3, 2, device="meta")
    with pytest.raises(Sent, match="meta"):
        readings._agreed([Reading("loss", 1.0, step=0)], model)
    with pytest.raises(Sent, match="meta"):
        merge.same_everywhere("merge_statistics_", {}, None, model)


def precision() -> tuple:
    found: list = []
    for read in (
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda: torch.backends.cudnn.allow_tf32,
        torch.get_float32_matmul_precision,
        lambda: torch.backends.cuda.matmul.fp32_precision,
        lambda: torch.backends.cudnn.conv.fp32_precision,
    ):
        try:
            found.append(read())
        except RuntimeError:  # older and newer names were mixed
            found.append(None)
    return tuple(found)


@pytest.fixture
def precisions():
    """Put back at the end, by the older names, which set the newer ones too."""
    matmul, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(matmul)
    torch._C._set_cudnn_allow_tf32(convolutions)


def newer_names() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "ieee"


@pytest.mark.usefixtures("precisions")
@pytest.mark.parametrize(
    "chosen",
    [lambda: None, lambda: torch.set_float32_matmul_precision("medium"), newer_names],
    ids=["default", "medium", "newer names"],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_probe_multiplies_float32_as_float32_and_leaves_the_choice_of_others(chosen, frozen, monkeypatch):
    """With TF32, what a folded weight rounds to is as far away as the limit allows."""
    chosen()
    monkeypatch.setattr(torch.backends, "flags_frozen", lambda: frozen)  # as torch.testing's own helpers do
    before = precision()
    with probe.whole_products():
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cudnn.conv.fp32_precision != "tf32"
    assert precision() == before


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips_is_none(fused):
    """A fused optimizer is called, and decides by itself to do nothing."""
    model = nn.Sequential(nn.Linear(4, 8), nk.BatchNorm1d(8, momentum=1.0), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)
    waiting = nk.accumulate_statistics(model, optimizer=optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    x = torch.randn(16, 4)
    with nk.watch(model, optimizer, every=1, out=None) as watched:
        for taken in range(2):
            optimizer.zero_grad()
            scaler.scale((model(x) * 10).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update(1.0)
            assert watched.steps == taken
            assert model[1].num_batches_tracked == taken
        assert watched.first_nan is None
    waiting.remove()


def test_under_autocast_the_type_of_an_output_does_not_hang_on_its_size(monkeypatch):
    """torch's layer, RMS and group norm give float32 there, and batch norm the type of the input."""
    words = "under autocast torch gives float32"
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    monkeypatch.setattr(triton, "_like_the_ones_they_ran_on", lambda device: True)
    with FakeTensorMode():
        x = torch.empty(2**20, 64, device="cuda", dtype=torch.bfloat16)
        for norm, told in ((nk.LayerNorm, True), (nk.RMSNorm, True), (nk.GroupNorm, True), (nk.BatchNorm1d, False)):
            call = nk.dispatch.Call(norm.spec, x, None, None, by_torch=lambda: x)
            assert any(words in reason for reason in triton.reluctance(call)) is told, norm


def test_lengths_that_are_too_long_are_refused_before_they_go_to_a_device():
    layer, x = nk.BatchNorm1d(3, device="meta"), torch.empty(2, 3, 5, device="meta")
    with pytest.raises(ValueError, match="a length is 9"):
        layer(x, lengths=torch.tensor([9, 2]))


def test_who_has_ended_is_told_to_a_device_once_and_not_at_every_step():
    ends = Ends(torch.empty(6, 3, 2, device="meta"), torch.tensor([6, 2, 1]))
    assert ends.going(0) is None
    assert ends.counts.device.type == "meta"
    assert all(ends.going(step)._base is ends.counts for step in range(1, 6))


@pytest.mark.parametrize(("when", "looks"), [("50%", False), ("plateau:5", True)])
def test_a_loss_that_no_strategy_wants_is_not_looked_at(when, looks):
    """On a GPU a look waits for the device; on this one there is nothing to see."""
    model = nn.Sequential(nn.Linear(3, 4), nk.BatchNorm1d(4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    attached = attach(model, optimizer, Freeze(when), total_steps=10)
    with attached, pytest.raises(RuntimeError) if looks else contextlib.nullcontext():
        attached.log(torch.empty((), device="meta"))
