"""Arms that several processes train together, networks with moving averages, and other statistics at test time."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import normkit as nk
from normkit.lab import Experiment, LabError, Metric, compare, recomputed
from normkit.lab.arm import Arm, parse_arm
from normkit.lab.build import build_model, check_arms
from normkit.lab.cell import FINAL, Cell
from normkit.lab.load import Source
from normkit.lab.norm_layer import norms_of
from normkit.lab.together import train_together
from normkit.lab.train import train
from normkit.lab.worker import seeded_data
from normkit.statistics.centred import Centred
from normkit.vocabulary.record import read_lines
from small_experiments import PATH, tiny

CNN = Source("digits-cnn")
LOSS = Metric("loss", nn.functional.cross_entropy, higher_is_better=False)


def cell(arm: str, steps: int = 6, phase: str = FINAL, task: str = "digits-cnn", lr: float = 0.1) -> Cell:
    return Cell(
        task=task,
        arm=parse_arm(arm),
        optimizer="momentum",
        lr=lr,
        seed=0,
        phase=phase,
        steps=steps,
        eval_every=2,
        batch_size=8,
        target=0.9,
        threads=1,
        data="",
        code="",
    )


def alone(arm: str, directory, **options) -> dict:
    experiment = CNN.load({})
    directory.mkdir()
    return train(cell(arm, **options), experiment, seeded_data(experiment, 0), directory)


def together(arm: str, directory, **options) -> dict:
    directory.mkdir()
    return train_together(CNN, cell(arm, **options), directory)


@pytest.mark.slow  # starts processes, which import torch
def test_two_synchronised_processes_train_the_network_of_one(tmp_path):
    one, two = alone("batch", tmp_path / "one"), together("batch:synchronized+processes:2", tmp_path / "two")
    ours, theirs = read_lines(tmp_path / "two" / "metrics.jsonl"), read_lines(tmp_path / "one" / "metrics.jsonl")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [2, 4, 6]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
        assert mine["validation_loss"] == pytest.approx(other["validation_loss"], rel=1e-3)
    assert two["initial_weights"] == one["initial_weights"]
    assert two["state"] == "done"
    assert two["steps"] == 6
    assert two["test_exact"] == pytest.approx(one["test_exact"], abs=0.01)
    assert two["cpu_seconds"] > 0
    assert two["norm_share"] is None  # its steps cannot be timed with identities in place of norms
    assert (tmp_path / "two" / "inside.jsonl").read_bytes() == b""


@pytest.mark.slow  # starts processes, which import torch
def test_statistics_that_are_not_synchronised_are_those_of_each_part(tmp_path):
    """What distinguishes the arms: without synchronising, two processes train another network than one does."""
    alone("batch", tmp_path / "one")
    together("batch+processes:2", tmp_path / "two")
    first = [read_lines(tmp_path / name / "metrics.jsonl")[0]["train_loss"] for name in ("one", "two")]
    assert abs(first[0] - first[1]) > 1e-3


@pytest.mark.slow  # starts processes, which import torch
def test_a_search_that_reaches_its_target_ends_in_all_processes(tmp_path):
    found = together("none+processes:2", tmp_path / "two", phase="search", steps=8)
    assert found["steps"] == 8  # 90 % is out of reach
    easy = replace(cell("none+processes:2", steps=8, phase="search"), target=0.0)
    (tmp_path / "easy").mkdir()
    assert train_together(CNN, easy, tmp_path / "easy")["steps"] == 2


@pytest.mark.slow  # starts processes, which import torch
def test_what_one_process_raises_ends_the_run_with_its_words(tmp_path):
    source = Source("raising", raising)
    (tmp_path / "cell").mkdir()
    with pytest.raises(Exception, match="this process has had enough"):
        train_together(source, cell("none+processes:2"), tmp_path / "cell")


class Raises(nn.Module):
    """Raises in the second process only; the first waits for it."""

    def __init__(self, norm_layer):
        super().__init__()
        self.layers = tiny().model(norm_layer)

    def forward(self, x):
        if torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
            raise RuntimeError("this process has had enough")
        return self.layers(x)


def raising() -> Experiment:
    return replace(tiny(), model=Raises)


@pytest.mark.slow  # starts processes, which import torch
def test_an_arm_of_two_processes_runs_beside_others(tmp_path):
    arms = "none, batch:synchronized+processes:2"
    result = compare(f"{PATH}:tiny", arms=arms, budget="quick", seeds=1, out=tmp_path / "run", parallel=2)
    states = {run["state"] for run in result.summary["runs"]}
    assert states <= {"done", "diverged"}, states
    found = result.summary["points"][0]["arms"][1]
    assert found["peak_memory_mb"] > result.summary["points"][0]["arms"][0]["peak_memory_mb"]  # of both together
    assert "synchronised batch norm over 2 processes" in result.answer.lower()


def test_an_arm_that_synchronises_needs_several_processes():
    with pytest.raises(LabError, match=r"write batch:synchronized\+processes:2"):
        check_arms(CNN.load({}), (Arm("batch:synchronized"),))


def test_a_batch_that_does_not_divide_is_refused_before_training(tmp_path):
    with pytest.raises(LabError, match="batch of 9 samples cannot be cut into 2 equal parts"):
        compare(f"{PATH}:tiny", arms="none,batch+processes:2", batch_size=9, out=tmp_path / "run")


def test_moving_averages_are_bound_to_the_convolution_before_each_norm():
    model, drawn = build_model(CNN.load({}), Arm("batch:moving_average:4"), seed=3)
    plain, same = build_model(CNN.load({}), Arm("batch"), seed=3)
    assert drawn == same
    assert model.state_dict().keys() >= plain.state_dict().keys()
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == len(norms_of(model)) == 7
    assert all(isinstance(conv, Centred) and not conv.bias.requires_grad for conv in convolutions)
    assert not any(conv.bias.any() for conv in convolutions)
    model(torch.randn(2, 1, 8, 8)).square().mean().backward()  # unbound, the first norm would raise


def test_moving_averages_behind_an_activation_have_nothing_to_be_bound_to():
    with pytest.raises(LabError, match=r"before '1\.branch\.\d+' there is ReLU|before '\d+' there is ReLU"):
        check_arms(CNN.load({}), (Arm("batch:moving_average", placement="after"),))


def test_the_share_of_a_batch_in_running_statistics_is_the_arms():
    model, _ = build_model(CNN.load({}), parse_arm("batch+running:0.02"), seed=0)
    assert {norm.momentum for norm in norms_of(model).values()} == {0.02}
    with pytest.raises(LabError, match="group_norm has no option 'momentum'"):
        check_arms(CNN.load({}), (parse_arm("group:4+running:0.02"),))


@pytest.mark.parametrize("norm", ["batch", "batch:ghost:4", "batch:renorm:3:5:0", "batch:moving_average:4"])
def test_exact_statistics_are_those_of_the_training_set_at_every_norm(norm):
    """By the loss, which is a smoother judge than the accuracy."""
    experiment, arm = replace(CNN.load({}), metric=LOSS), Arm(norm)
    data = seeded_data(experiment, 0)
    model, _ = build_model(experiment, arm, seed=0)
    for step in range(3):
        model(data.train.take(torch.arange(8) + 8 * step)[0])
    before = copy.deepcopy(model.state_dict())
    found = recomputed.measure(model, experiment, arm, data, batch_size=8)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # the run is untouched
    # The recomputed variance is the unbiased one of 64,000 values, in seven layers.
    assert found["test_exact"] == pytest.approx(_exact(model, data), rel=1e-3)
    assert found["test_batch"] == pytest.approx(_by_batch(model, data, 8), rel=1e-4)


def _exact(model, data) -> float:
    """By hand, norm after norm: each gets the moments of what reaches it, and then lets the whole set through."""
    plain = copy.deepcopy(model).eval()
    inputs, _ = data.train.first(1000)
    centre = not any(isinstance(norm.statistics, nk.statistics.MovingAverage) for norm in norms_of(plain).values())
    for norm in norms_of(plain).values():
        seen = []
        hook = norm.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        with torch.no_grad():
            plain(inputs)
        hook.remove()
        mean = seen[0].double().mean((0, 2, 3)) if centre else torch.zeros(16).double()
        norm.running_mean.copy_(mean)
        norm.running_var.copy_((seen[0].double() - mean[:, None, None]).square().mean((0, 2, 3)))
    return _loss(plain, [data.test.first(500)])


def _by_batch(model, data, size: int) -> float:
    plain = build_model(CNN.load({}), Arm("batch"), seed=0)[0]
    plain.load_state_dict(nk.plain_state_dict(model))
    if any(isinstance(norm.statistics, nk.statistics.MovingAverage) for norm in norms_of(model).values()):
        for name in norms_of(plain):
            plain.get_submodule(name).register_forward_hook(_by_mean_square)
    return _loss(plain, [data.test.take(part) for part in torch.arange(500).tensor_split(500 // size)])


def _by_mean_square(norm, given, _):
    x = given[0]
    scale = (x.square().mean((0, 2, 3)) + norm.eps).rsqrt() * norm.weight
    return x * scale[:, None, None] + norm.bias[:, None, None]


def _loss(model, batches) -> float:
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(model(x), y, reduction="none") for x, y in batches]
    return float(torch.cat(losses).mean())


def test_an_arm_without_batch_norm_has_no_other_statistics():
    experiment = CNN.load({})
    model, _ = build_model(experiment, Arm("group:4"), seed=0)
    found = recomputed.measure(model, experiment, Arm("group:4"), seeded_data(experiment, 0), 8)
    assert found == {"test_exact": None, "test_batch": None}
