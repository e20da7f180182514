"""The tasks about depth, variants and the size of the data: what their arms build, and that the arms mean it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import normkit as nk
from normkit import blocks
from normkit.lab import LabError
from normkit.lab.arm import Arm, parse_arm, parse_arms
from normkit.lab.build import build_model, build_optimizer
from normkit.lab.cell import Cell
from normkit.lab.comparison import usual_arms
from normkit.lab.load import Source
from normkit.lab.tasks.variants import EVERY, QUICK
from normkit.lab.train import train
from normkit.lab.worker import seeded_data
from normkit.report.labels import label


def deep(arm: str, depth: int = 8, **options):
    experiment = Source("digits-deep").load({"depth": depth} | options)
    return experiment, build_model(experiment, parse_arm(arm), 0)[0]


KINDS = {
    "none+residual:skipinit": blocks.SkipInit,
    "batch+residual:skipinit": blocks.SkipInit,
    "none+residual:fixup": blocks.FixupResidual,
    "none+residual:normalizer-free": blocks.NormalizerFreeResidual,
}


@pytest.mark.parametrize("kind", ["dense", "convolutional"])
@pytest.mark.parametrize("arm", [arm for arm in KINDS if "residual" in arm])
def test_an_arm_has_the_blocks_it_names(arm, kind):
    experiment, model = deep(arm, kind=kind)
    assert sum(isinstance(module, KINDS[arm]) for module in model.modules()) == 4
    x, _ = seeded_data(experiment, 0).train.first(4)
    assert model(x).shape == (4, 10)


def test_no_skip_is_the_same_network_without_the_sum():
    x = torch.randn(5, 64)
    for arm in ("none", "batch"):
        _, with_skip = deep(arm)
        _, without = deep(f"{arm}+residual:none")
        assert [*map(torch.Tensor.numel, with_skip.parameters())] == [*map(torch.Tensor.numel, without.parameters())]
        assert not torch.allclose(with_skip(x), without(x))
        nested = without[1](x)
        assert torch.allclose(with_skip[1](x), x + nested, atol=1e-5)


def test_fixup_scales_the_weights_that_all_arms_start_from():
    _, plain = deep("none")
    experiment, fixed = deep("none+residual:fixup")
    drawn = build_model(experiment, parse_arm("none+residual:fixup"), 0)[1]
    assert drawn == build_model(experiment, parse_arm("none"), 0)[1]
    first = fixed[1].layers[0].weight
    assert torch.allclose(first, plain[1].branch[2].weight * 4**-0.5)
    assert not fixed[1].layers[1].weight.any()
    assert not fixed[-1].weight.any()


def test_clipping_is_attached_and_leaves_the_last_layer_out():
    experiment, model = deep("none+clip:0.02")
    optimizer = build_optimizer(experiment, parse_arm("none+clip:0.02"), model, lr=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = 100 * torch.ones_like(parameter)
    optimizer.step()
    names = [name for name, _ in model.named_parameters()]
    moved = {name: (p.detach() - before[name]) for name, p in model.named_parameters()}
    assert moved[names[-2]].abs().max() == pytest.approx(100)  # the weight of the last layer
    first = moved["0.weight"].norm(dim=1)
    assert torch.allclose(first, 0.02 * before["0.weight"].norm(dim=1), rtol=1e-3)


def test_two_hundred_layers_start_with_gradients_that_differ_by_design():
    """First layer over last, at the start: the question of the page, answered once here for one seed."""
    ratios = {}
    for arm in ("none+residual:normalizer-free", "none+residual:skipinit", "batch", "batch+residual:none"):
        experiment, model = deep(arm, depth=100)
        x, y = seeded_data(experiment, 0).train.first(50)
        experiment.loss(model.train()(x), y).backward()
        weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)][1:-1]
        norms = [float(w.grad.norm()) for w in weights]
        ratios[arm] = (norms[0] + 1e-30) / (norms[-1] + 1e-30)
    assert ratios["batch+residual:none"] > 1e3
    assert all(ratios[arm] < 100 for arm in ratios if arm != "batch+residual:none")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("none+residual:fixups", r"residual:fixups is unknown.*fixup"),
        ("none+clip:0", r"clip:0 is no ratio of gradient and weight"),
        ("none+clip:x", r"clip:x is no number; write e\.g\. clip:0\.02"),
    ],
)
def test_a_mistake_in_the_new_words_is_answered(text, words):
    with pytest.raises(LabError, match=words):
        parse_arm(text)


def test_arms_without_the_new_words_have_the_record_they_had():
    assert {"residual", "clip"}.isdisjoint(parse_arm("batch").record("sgd"))
    arm = parse_arm("none+residual:normalizer-free+clip:0.02")
    assert arm == Arm(residual="normalizer-free", clip=0.02)
    assert arm.name == "none+residual:normalizer-free+clip:0.02"
    assert parse_arm(arm.name) == arm
    assert label(arm.name) == "normalizer-free with adaptive clipping at 0.02"
    assert label("batch+residual:none") == "batch norm without skips"
    assert label("batch+residual:skipinit") == "batch norm and SkipInit"


def test_what_stands_for_a_norm_is_refused_beside_one():
    with pytest.raises(LabError, match=r"write none\+residual:fixup"):
        deep("batch+residual:fixup")
    with pytest.raises(LabError, match="choose an even --depth from 4"):
        Source("digits-deep").load({"depth": 5})
    experiment = Source("digits-cnn").load({"depth": 4})
    with pytest.raises(LabError, match="needs `residual`"):
        build_model(experiment, parse_arm("none+residual:skipinit"), 0)


def test_a_quick_look_takes_fewer_arms_where_there_are_many():
    for task in ("variants", "digits-deep"):
        experiment = Source(task).load({})
        assert {*usual_arms(experiment, "quick")} < {*usual_arms(experiment, "default")} == {*experiment.arms}
        assert usual_arms(experiment, "thorough") == tuple(experiment.arms)
    plain = Source("digits").load({})
    assert usual_arms(plain, "quick") == tuple(plain.arms)


def test_every_norm_has_an_arm_among_the_variants_and_no_relu_behind_an_activation():
    experiment = Source("variants").load({"depth": 4})
    assert {*QUICK} < {*experiment.arms} < {*EVERY}
    arms = parse_arms(list(EVERY))
    made = {}
    for arm in arms:
        model, _ = build_model(experiment, arm, 0)
        norms = [m for m in model.modules() if isinstance(m, nk.norm.Norm)]
        made[arm.name] = norms[0].spec.name
        brings = norms[0].activates or norms[0].activation is not None
        assert sum(type(m) is nn.ReLU for m in model.modules()) == (0 if brings else 3), arm.name
    assert {*made.values()} == {*nk.list_norms()}


def test_a_share_of_the_text_is_a_part_of_it_and_the_rest_is_untouched():
    whole, part = (Source("data-size").load({"share": share, "context": 12}) for share in (1.0, 0.05))
    assert len(part.data.train) == round(0.05 * len(whole.data.train))
    assert len(part.data.validation) == len(whole.data.validation)
    first, _ = part.data.train.first(3)
    everything, _ = whole.data.train.first(len(whole.data.train))
    assert all((everything == window).all(1).any() for window in first)
    for wrong in (0.0, 2.0, 1e-5):
        with pytest.raises(LabError, match="data-size with share"):
            Source("data-size").load({"share": wrong})


def test_what_a_switchable_norm_has_learnt_is_in_the_journal(tmp_path):
    experiment = Source("variants").load({"depth": 4})
    fields = {"steps": 3, "eval_every": 3, "batch_size": 8, "target": 0.9, "threads": 1, "data": "", "code": ""}
    cell = Cell("variants", parse_arm("switchable"), "momentum", 0.1, 0, "final", **fields)
    train(cell, experiment, seeded_data(experiment, 0), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "inside.jsonl").read_text().splitlines()]
    learnt = [line["switchable"] for line in lines]
    assert len(learnt[0]) == 3
    for parts in learnt[-1].values():
        assert sum(parts["mean"].values()) == pytest.approx(1)
        assert {*parts["var"]} == {"instance", "layer", "batch"}
    assert learnt[0] != learnt[-1]
