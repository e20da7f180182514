"""Training steps of whole models: which variants are timed, refused and skipped."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import normkit as nk
from bench_cases import BRIEF
from normkit.bench import models, training


def test_resnet50_is_the_one_of_the_paper():
    with torch.device("meta"):
        model = models.ResNet()
    assert sum(parameter.numel() for parameter in model.parameters()) == 25_557_032
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == 53


TINY = {
    "resnet50": models.Setting(
        lambda: models.ResNet((1, 1, 1, 1), 8, 10),
        lambda: models._images(8, 64, 10),
        nn.functional.cross_entropy,
        "tiny",
        models.LAYOUTS,
    ),
    "unet": models.Setting(lambda: models.UNet(32), lambda: models._noise(2, 8), nn.functional.mse_loss, "tiny"),
    "transformer": models.Setting(
        lambda: models.Transformer(1, 32, 2), lambda: models._bytes(2, 8), models._per_symbol, "tiny"
    ),
}


@pytest.mark.parametrize(("name", "fused"), [("resnet50", 5), ("unet", 6)])
def test_accelerate_takes_in_what_follows_the_norms_of_these_models(name, fused):
    """They stand in the package of normkit, whose own layers are left as they are."""
    model = TINY[name].make()
    told = nk.accelerate_(model).to_json()
    assert sum(change["action"] == "forward fused" for change in told["changed"]) == fused
    assert not told["refused"]


def faster(model: nn.Module) -> None:
    """Stands for accelerate_: leaves the model as it is."""


def wrong(model: nn.Module) -> None:
    """Stands for an accelerate_ that changes what the model computes."""
    norm = next(m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm, nn.RMSNorm)))
    norm.register_forward_hook(lambda module, given, y: 1.3 * y + 0.5)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(("accelerate", "state"), [(faster, "measured"), (wrong, "refused"), (None, "skipped")])
def test_a_training_step_of_each_model(monkeypatch, name, dtype, accelerate, state):
    monkeypatch.setitem(models.MODELS, name, TINY[name])
    monkeypatch.setattr(nk, "accelerate_", accelerate, raising=False)
    effort = replace(BRIEF, wanted=("torch", "normkit"))
    layout = TINY[name].layouts[-1]
    records = {r["implementation"]: r for r in training.measure(name, dtype, layout, effort)}
    assert {record["layout"] for record in records.values()} == {layout}
    assert (records["torch"]["state"], records["normkit"]["state"]) == ("measured", state)
    assert ("step" in records["normkit"]) == (state == "measured")
    assert records["torch"]["step"]["ms"] >= records["torch"]["forward"]["ms"] > 0
    parity = records["torch"]["parity"]
    assert 0 < parity["gradients"]["error"] < (1e-3 if dtype == "float32" else 0.5)
    assert 0 < parity["loss"]["error"] < (1e-5 if dtype == "float32" else 0.05)


def test_the_yardstick_is_the_model_without_its_norms(monkeypatch):
    monkeypatch.setitem(models.MODELS, "unet", TINY["unet"])
    bare = training._without_norms(TINY["unet"].make())
    assert not [m for m in bare.modules() if isinstance(m, nn.GroupNorm)]
    assert [m for m in bare.modules() if isinstance(m, nn.Conv2d)]
    effort = replace(BRIEF, wanted=("torch", training.NO_NORMS))
    plain, bare = training.measure("unet", "float32", "contiguous", effort)
    assert (bare["implementation"], bare["state"], "parity" in bare) == ("no norms", "measured", False)
    assert bare["step"]["speedup"]["value"] > 0
    assert "speedup" not in plain["step"]


def test_a_model_that_a_compiler_cannot_take_costs_its_own_row_only(monkeypatch):
    monkeypatch.setitem(models.MODELS, "transformer", TINY["transformer"])

    def broken(model, **options):
        def call(x):
            raise RuntimeError("no C++ compiler")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    effort = replace(BRIEF, wanted=("torch", "torch.compile"))
    records = {r["implementation"]: r for r in training.measure("transformer", "float32", "contiguous", effort)}
    assert records["torch.compile"]["state"] == "skipped"
    assert "no C++ compiler" in records["torch.compile"]["why"]
    assert "step" in records["torch"]
