"""Every built-in task: it builds with every arm, starts alike, trains, and is what its description says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from normkit.lab import TASKS, LabError
from normkit.lab.arm import parse_arm
from normkit.lab.build import build_model
from normkit.lab.cell import Cell
from normkit.lab.initial import weights_of
from normkit.lab.load import Source
from normkit.lab.recipe import LEAST_RATES
from normkit.lab.train import train
from normkit.lab.worker import seeded_data

CLASSIFIERS = [task for task in TASKS if task != "gan"]
"""What takes dropout and a placement; tests/test_gan_task.py has the other one."""
ARMS = ["none", "batch", "layer", "rms", "batch+placement:after", "batch+dropout:0.2"]
SMALL = {
    "digits-cnn": {"depth": 4},
    "digits-deep": {"depth": 4},
    "variants": {"depth": 4},
    "text": {"depth": 1, "width": 16, "context": 12},
    "digits-vit": {"depth": 1, "width": 16, "grid": 2},
    "data-size": {"depth": 1, "width": 16, "context": 12},
}


def experiment(task: str, **options):
    return Source(task).load(SMALL.get(task, {}) | options)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_says_what_it_is_and_how_it_is_searched(task):
    found = experiment(task)
    assert found.name == task
    assert found.title
    assert len(found.description) > 100
    assert len(found.rates) >= LEAST_RATES + 2 * (task != "gan")
    assert found.steps % found.eval_every == 0
    sizes = [len(part) for part in seeded_data(found, 0)]
    assert min(sizes) > 0
    assert sizes[0] >= found.batch_size


@pytest.mark.parametrize("task", CLASSIFIERS)
def test_every_arm_of_a_task_starts_from_the_same_weights(task):
    found = experiment(task)
    fingerprints = {arm: build_model(found, parse_arm(arm), 5)[1] for arm in ARMS}
    assert len(set(fingerprints.values())) == 1
    assert build_model(found, parse_arm("none"), 6)[1] != fingerprints["none"]


@pytest.mark.parametrize("task", CLASSIFIERS)
@pytest.mark.parametrize("arm", ["batch", "rms+placement:after+dropout:0.2"])
def test_a_task_trains(task, arm, tmp_path):
    found = experiment(task)
    fields = {
        "steps": 3,
        "eval_every": 3,
        "batch_size": 8,
        "target": found.target,
        "threads": 1,
        "data": "",
        "code": "",
    }
    asked = Cell(task, parse_arm(arm), found.optimizer, min(found.rates), 0, "final", **fields)
    status = train(asked, found, seeded_data(found, 0), tmp_path)
    assert status["state"] == "done"
    assert status["test"] is not None
    assert status["norm_share"] is not None
    assert (status["dead_units"] is None) == (task in ("digits", "digits-sequence", "text", "digits-vit", "data-size"))
    assert bool(status["variance_ratio"]) == ("dropout" in arm)
    assert (status["evaluation_ms"] is not None) == (task == "digits-vit")
    assert (status["folded_ms"] is not None) == (task == "digits-vit" and arm == "batch")
    assert status["fold_error"] is None or status["fold_error"] < 1e-5


@pytest.mark.parametrize("task", CLASSIFIERS)
def test_placement_moves_the_norm_and_nothing_else(task):
    found = experiment(task)
    before, after = (build_model(found, parse_arm(f"layer{where}"), 0)[0] for where in ("", "+placement:after"))
    x, _ = seeded_data(found, 0).train.first(4)
    if task != "digits-sequence":  # inside a recurrent layer there are several
        assert sum(p.numel() for p in before.parameters()) == sum(p.numel() for p in after.parameters())
    assert not torch.allclose(before.eval()(x), after.eval()(x))


def test_digits_is_the_network_of_the_paper():
    found = experiment("digits")
    net = build_model(found, parse_arm("batch"), 0)[0]
    kinds = [type(module).__name__ for module in net]
    assert kinds == ["Linear", "BatchNorm1d", "Sigmoid"] * 3 + ["Linear"]
    assert [weight.shape for _, weight in weights_of(net)] == [(100, 64), (100, 100), (100, 100), (10, 100)]
    assert (found.batch_size, found.optimizer, found.target) == (60, "sgd", 0.95)
    assert [len(part) for part in seeded_data(found, 0)] == [1000, 297, 500]


@pytest.mark.parametrize("depth", [4, 8, 9, 200])
def test_the_depth_of_the_residual_network_counts_its_weighted_layers(depth):
    net = build_model(experiment("digits-cnn", depth=depth), parse_arm("none"), 0)[0]
    assert len(list(weights_of(net))) == depth - depth % 2


def test_without_skips_a_block_is_its_branch():
    x = torch.randn(2, 1, 8, 8)
    with_skips, without = (
        build_model(experiment("digits-cnn", skip=skip), parse_arm("none"), 0)[0].eval() for skip in (True, False)
    )
    assert not torch.allclose(with_skips(x), without(x))
    with torch.no_grad():
        for net in (with_skips, without):
            net[3].branch[-2].weight.zero_()  # the branch says nothing: what is left is the input, or nothing
            net[3].branch[-2].bias.zero_()
    assert torch.allclose(with_skips[3](torch.ones(1, 16, 8, 8)), torch.ones(1, 16, 8, 8))
    assert torch.allclose(without[3](torch.ones(1, 16, 8, 8)), torch.zeros(1, 16, 8, 8))


@pytest.mark.parametrize(("unit", "shape"), [("rows", (8, 8)), ("pixels", (64, 1))])
def test_a_digit_is_read_by_rows_or_by_pixels(unit, shape):
    x, _ = seeded_data(experiment("digits-sequence", unit=unit), 0).train.first(3)
    assert x.shape == (3, *shape)


@pytest.mark.parametrize("arm", ["none", "layer", "batch", "rms+placement:after"])
def test_the_language_model_is_causal_in_evaluation(arm):
    net = build_model(experiment("text"), parse_arm(arm), 0)[0].eval()
    characters = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    changed = characters.clone()
    changed[:, 7] += 1
    before, after = net(characters), net(changed)
    assert torch.allclose(before[:, :7], after[:, :7], atol=1e-5)
    assert not torch.allclose(before[:, 7:], after[:, 7:], atol=1e-3)


def test_batch_norm_in_training_sees_later_characters_as_the_description_says():
    found = experiment("text")
    assert "a faint view of the future" in found.description
    characters = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    changed = characters.clone()
    changed[:, 11] += 1
    for arm, leaks in (("batch", True), ("layer", False)):
        net = build_model(found, parse_arm(arm), 0)[0]
        assert torch.allclose(net(characters)[:, :11], net(changed)[:, :11], atol=1e-6) != leaks


def test_the_text_is_split_without_overlap_and_scored_in_bits():
    found = experiment("text", context=31)
    data = seeded_data(found, 0)
    windows = [{tuple(row.tolist()) for row in part.first(10**6)[0]} for part in data]
    assert [len(part) for part in data][1:] == [64, 256]
    together = sum(len(part) for part in data) * 32
    assert together > 0.99 * int(found.description.split(" characters,")[0].split("(")[-1])
    assert not windows[1] & windows[2]
    uniform = torch.zeros(2, 3, 8)
    assert found.metric.function(uniform, torch.zeros(2, 3, dtype=torch.long)).item() == pytest.approx(3.0)
    assert not found.metric.higher_is_better


def test_a_weight_is_drawn_with_the_deviation_its_method_says():
    glorot = build_model(experiment("digits", width=400), parse_arm("none"), 0)[0]
    he = build_model(experiment("digits-relu", width=400), parse_arm("none"), 0)[0]
    assert float(glorot[3].weight.detach().std()) == pytest.approx((2 / 800) ** 0.5, rel=0.02)
    assert float(he[3].weight.detach().std()) == pytest.approx((2 / 400) ** 0.5, rel=0.02)
    assert all(float(m.bias.detach().abs().max()) == 0 for m in glorot if isinstance(m, nn.Linear))


@pytest.mark.parametrize("task", ["digits", "digits-relu", "digits-cnn", "digits-sequence", "digits-vit"])
def test_image_tasks_take_a_persons_own_images(task, tmp_path):
    x = np.random.default_rng(0).random((80, 3, 12, 12))
    np.savez(tmp_path / "mine.npz", x=x, y=np.arange(80) % 5)
    found = experiment(task, data=str(tmp_path / "mine.npz"))
    x, _ = seeded_data(found, 0).train.first(4)
    assert build_model(found, parse_arm("batch"), 0)[0](x).shape == (4, 5)
    assert "mine" in found.title


def test_the_tabular_task_takes_a_persons_own_table(tmp_path):
    np.savez(tmp_path / "mine.npz", x=np.random.default_rng(0).random((80, 7)), y=np.arange(80) % 2)
    found = experiment("tabular", data=str(tmp_path / "mine.npz"))
    assert build_model(found, parse_arm("none"), 0)[0][0].in_features == 7
    for task in ("digits-cnn", "digits-sequence"):
        with pytest.raises(LabError, match=rf"{task} needs images, and mine has 7 features per sample"):
            experiment(task, data=str(tmp_path / "mine.npz"))


@pytest.mark.parametrize(
    ("task", "options", "words"),
    [
        ("digits-cnn", {"depth": 2}, "with depth 2: the smallest residual network has 4 layers"),
        ("digits-sequence", {"unit": "columns"}, "cannot read by 'columns'; choose unit=rows or unit=pixels"),
        ("text", {"width": 30}, "width 30 does not divide into 4 heads"),
        ("text", {"data": "mine.txt"}, "text takes no option 'data'"),
        ("digits", {"skip": True}, "digits takes no option 'skip'"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(task, options, words):
    with pytest.raises(LabError, match=words):
        experiment(task, **options)


def test_a_missing_scikit_learn_names_the_line_to_type(monkeypatch):
    import sys

    from normkit.lab.tasks import samples

    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(LabError, match=r'needs scikit-learn.*pip install "normkit\[lab\]"'):
        samples.digits(None)
