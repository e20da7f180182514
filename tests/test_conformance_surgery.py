"""Rows of docs/conformance.md that are about changing a model: shown on torch, then what normkit's surgery does.

A test whose name begins with test_torch goes red when torch mends the thing; then docs/conformance.md wants a new line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import normkit as nk


class Named(nn.Module):
    """A model that is called by name, as those of Hugging Face are."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.inner(pixel_values)


@dataclass(frozen=True)
class Variant:
    """How the same data reach a model."""

    name: str
    model: Callable[[nn.Module], nn.Module] = lambda layer: layer
    batch: Callable[[Tensor], Any] = lambda x: (x, torch.zeros(len(x)))
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return self.name


VARIANTS = [
    Variant("tuple"),
    Variant("dict", Named, lambda x: {"pixel_values": x, "labels": torch.zeros(len(x)), "id": ["a"] * len(x)}),
    Variant("bfloat16", lambda layer: layer.bfloat16(), lambda x: (x.bfloat16(),), torch.bfloat16),
    Variant("channels_last", batch=lambda x: (x.contiguous(memory_format=torch.channels_last),)),
]
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)
each_library = pytest.mark.parametrize("library", [nn, nk], ids=["torch's layer", "normkit's layer"])


def calibrated(layer: nn.Module, data: list[Tensor], variant: Variant) -> nn.Module:
    """The layer alone in a model, after nk.calibrate_ on the data."""
    certificate = nk.calibrate_(variant.model(layer), [variant.batch(x) for x in data])
    assert len(certificate.changed) == 1
    return layer


def assert_near(found: Tensor, wanted: Tensor, variant: Variant) -> None:
    """To the rounding of what the buffers are kept in."""
    limit = 8 * torch.finfo(found.dtype).eps * wanted.abs().max().clamp_min(1)
    assert (found.double() - wanted.double()).abs().max() <= limit, f"{found} {wanted}"


# Row 3: the spread between batches is missing from the variance.


def sorted_batches() -> list[Tensor]:
    """Four batches, each at another level."""
    return [torch.randn(8, 3, 4, 4) + 5 * level for level in range(4)]


def test_torch_row_3_update_bn_misses_the_spread_between_batches():
    layer, data = nn.BatchNorm2d(3), sorted_batches()
    update_bn(data, layer)
    truth = torch.cat(data).var((0, 2, 3))
    assert (layer.running_var < 0.05 * truth).all()


@each_library
@each_variant
def test_normkit_row_3_the_variance_is_that_of_all_values(library, variant):
    data = [x.to(variant.dtype).float() for x in sorted_batches()]
    layer = calibrated(library.BatchNorm2d(3), data, variant)
    assert_near(layer.running_var, torch.cat(data).double().var((0, 2, 3)), variant)
    assert_near(layer.running_mean, torch.cat(data).double().mean((0, 2, 3)), variant)


# Row 4: a batch of 2 weighs as much as one of 100.


def unequal_batches() -> list[Tensor]:
    return [torch.zeros(100, 2, 1, 1), torch.full((2, 2, 1, 1), 10.0)]


def test_torch_row_4_update_bn_weighs_batches_and_not_values():
    layer = nn.BatchNorm2d(2)
    update_bn(unequal_batches(), layer)
    assert layer.running_mean.tolist() == [5.0, 5.0]


@each_library
@each_variant
def test_normkit_row_4_every_value_weighs_the_same(library, variant):
    layer = calibrated(library.BatchNorm2d(2), unequal_batches(), variant)
    assert_near(layer.running_mean, torch.tensor([20 / 102] * 2), variant)


# Row 5: a frozen layer is overwritten and thawed, and dropout is on.


class WithFrozen(nn.Module):
    def __init__(self, library: Any, p: float) -> None:
        super().__init__()
        self.dropout, self.frozen, self.free = nn.Dropout(p), library.BatchNorm2d(3), library.BatchNorm2d(3)
        self.train()
        self.frozen.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.free(self.frozen(self.dropout(x)))


def test_torch_row_5_update_bn_thaws_what_is_frozen_and_drops_out():
    model, x = WithFrozen(nn, p=1.0), torch.randn(8, 3, 4, 4) + 7
    update_bn([x], model)
    assert model.frozen.running_mean.abs().max() == 0  # of what dropout left: nothing
    assert model.frozen.num_batches_tracked == 1
    assert model.frozen.momentum == 0.1
    assert model.free.running_mean.abs().max() < 1e-6


@each_library
@each_variant
def test_normkit_row_5_frozen_layers_stay_and_nothing_drops_out(library, variant):
    model, x = WithFrozen(library, p=1.0), torch.randn(8, 3, 4, 4) + 7
    certificate = nk.calibrate_(variant.model(model), [variant.batch(x)])
    assert [row.module.rpartition(".")[2] for row in certificate.skipped] == ["frozen"]
    assert model.frozen.num_batches_tracked == 0
    assert not model.frozen.training
    assert model.dropout.training
    assert model.free.training
    assert (model.free.running_mean > 6.5).all()


# Row 6: dict batches, instance norms that track, an exception on the way.


def test_torch_row_6_update_bn_fails_on_dicts_passes_instance_norms_by_and_leaves_a_mess_behind():
    with pytest.raises(AttributeError):
        update_bn([{"pixel_values": torch.randn(4, 3, 2, 2)}], Named(nn.BatchNorm2d(3)), device="cpu")
    instance = nn.InstanceNorm2d(3, track_running_stats=True)
    update_bn([torch.randn(4, 3, 5, 5) + 9], instance)
    assert instance.running_mean.tolist() == [0.0, 0.0, 0.0]
    model = nn.Sequential(nn.BatchNorm2d(3)).eval()
    with pytest.raises(ValueError, match="4D"):
        update_bn([torch.randn(4, 3)], model)
    assert model[0].momentum is None
    assert model.training


@each_library
@each_variant
def test_normkit_row_6_instance_norms_are_calibrated_too(library, variant):
    data = [(torch.randn(n, 3, 5, 5) * 2 + 9).to(variant.dtype).float() for n in (4, 1, 7)]
    layer = calibrated(library.InstanceNorm2d(3, track_running_stats=True), data, variant)
    everything = torch.cat(data).double()
    assert_near(layer.running_mean, everything.mean((2, 3)).mean(0), variant)
    assert_near(layer.running_var, everything.var((2, 3)).mean(0), variant)


@each_library
@each_variant
def test_normkit_row_6_an_exception_leaves_everything_as_it_was(library, variant):
    inner = nn.Sequential(library.BatchNorm2d(3), nn.Dropout())
    model = variant.model(inner).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    good, bad = torch.randn(4, 3, 2, 2), torch.randn(4, 5, 2, 2)
    with pytest.raises(Exception, match="3") as caught:
        nk.calibrate_(model, [variant.batch(good), variant.batch(bad)])
    assert "calibrate_: this was batch 2; nothing was changed" in caught.value.__notes__[0]
    assert not any(module.training for module in model.modules())
    assert inner[0].momentum == 0.1
    assert not inner[0]._forward_pre_hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


# Row 11: what becomes of hooks, subclasses and shared layers; torch's side is in test_conformance_statistics.py.


class Shifted(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 100


@each_library
@each_variant
def test_normkit_row_11_sync_keeps_hooks_subclasses_and_shared_layers(library, variant):
    hooked, shared = library.BatchNorm2d(3), library.BatchNorm2d(3)
    hooked.register_forward_hook(lambda module, args, output: output + 1000)
    inner = nn.Sequential(hooked, Shifted(3), nn.Sequential(shared), nn.Sequential(shared)).eval()
    model, batch = variant.model(inner), variant.batch(torch.randn(4, 3, 5, 5))
    probe = {"pixel_values": batch["pixel_values"]} if isinstance(batch, dict) else batch[:1]
    x = next(iter(probe.values())) if isinstance(probe, dict) else probe[0]
    before = model(x)
    certificate = nk.sync_(model, example_inputs=probe)
    assert len(certificate.changed) == 2
    assert "is a subclass of BatchNorm2d" in certificate.refused[0].reason
    assert len(hooked._forward_hooks) == 1
    assert inner[2][0] is inner[3][0]
    torch.testing.assert_close(model(x), before)
    nk.unsync_(model, example_inputs=probe)
    assert type(shared) is library.BatchNorm2d


# Row 17: an exponential average truncates the counter of batches.


def averaged(library: Any, variant: Variant) -> tuple[AveragedModel, list[Any]]:
    torch.manual_seed(0)
    model = variant.model(nn.Sequential(nn.Conv2d(3, 4, 3), library.BatchNorm2d(4)))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    batches = [variant.batch(torch.randn(6, 3, 5, 5) * 3 + 2) for _ in range(10)]
    for batch in batches:
        model(batch["pixel_values"]) if isinstance(batch, dict) else model(batch[0])
        average.update_parameters(model)
    return average, batches


def norm_of(model: nn.Module) -> Any:
    return next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_torch_row_17_the_average_has_seen_one_batch_of_ten():
    average, _ = averaged(nn, VARIANTS[0])
    assert norm_of(average).num_batches_tracked == 1


@each_library
@each_variant
def test_normkit_row_17_after_calibrating_the_average_counter_and_statistics_are_right(library, variant):
    average, batches = averaged(library, variant)
    seen: list[Tensor] = []
    norm = norm_of(average)
    with torch.no_grad():
        handle = norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        for batch in batches:
            average(batch["pixel_values"]) if isinstance(batch, dict) else average(batch[0])
        handle.remove()
    nk.calibrate_(average, batches)
    assert norm.num_batches_tracked == 10
    assert_near(norm.running_mean, torch.cat(seen).double().mean((0, 2, 3)), variant)
    assert_near(norm.running_var, torch.cat(seen).double().var((0, 2, 3)), variant)
