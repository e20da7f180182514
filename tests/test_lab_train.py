"""The training loop: equal starts, probes that change nothing, resumption bit for bit, and what a run reports."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from normkit.lab import Experiment, LabError, checkpoint, closing, train
from normkit.lab.arm import parse_arm
from normkit.lab.build import build_model, check_arms
from normkit.lab.cell import Cell
from normkit.lab.data import as_data
from normkit.lab.initial import weights_of
from normkit.lab.norm_layer import NormLayer, norms_of
from normkit.lab.probe import activation_inputs, moments
from normkit.lab.worker import seeded_data
from normkit.vocabulary.record import read_lines
from small_experiments import diverging, ignores_norms, model, takes_no_dropout, tiny

TIMES = {"seconds"}
ARMS = ["none", "batch", "layer", "rms", "group:4", "dyt", "batch+dropout:0.3", "batch+placement:after"]


def cell(arm="batch", phase="final", lr=0.1, seed=0, **changes) -> Cell:
    fields = {"steps": 24, "eval_every": 4, "batch_size": 16, "target": 0.8, "threads": 1, "data": "", "code": ""}
    return Cell("tiny", parse_arm(arm), "sgd", lr, seed, phase, **(fields | changes))


def run(asked: Cell, place, experiment: Experiment | None = None, seconds: float = 1e9):
    place.mkdir(parents=True, exist_ok=True)
    experiment = experiment or tiny()
    return train.train(asked, experiment, seeded_data(experiment, asked.seed), place, seconds)


def lines(place, name="metrics.jsonl"):
    return [{key: value for key, value in line.items() if key not in TIMES} for line in read_lines(place / name)]


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_starts_from_the_same_weights(arm):
    weights = {name: weight.clone() for name, weight in weights_of(build_model(tiny(), parse_arm("none"), 3)[0])}
    same, drawn = build_model(tiny(), parse_arm(arm), 3)
    other, drawn_otherwise = build_model(tiny(), parse_arm(arm), 4)
    assert [w.shape for w in weights.values()] == [w.shape for _, w in weights_of(same)]
    assert all(torch.equal(a, b) for a, (_, b) in zip(weights.values(), weights_of(same), strict=True))
    assert not any(torch.equal(a, b) for a, (_, b) in zip(weights.values(), weights_of(other), strict=True))
    assert drawn == build_model(tiny(), parse_arm("none"), 3)[1] != drawn_otherwise


def test_the_gain_multiplies_the_weights_and_nothing_else():
    plain, drawn = build_model(tiny(), parse_arm("batch"), 0)
    scaled, drawn_before_the_gain = build_model(tiny(), parse_arm("batch+init:0.25"), 0)
    gained = {name for name, _ in weights_of(plain)}
    assert len(gained) == 2
    assert drawn == drawn_before_the_gain
    for (name, a), (_, b) in zip(plain.named_parameters(), scaled.named_parameters(), strict=True):
        assert torch.equal(a * (0.25 if name in gained else 1), b), name


def test_two_runs_of_one_cell_agree_bit_for_bit(tmp_path):
    first, second = (run(cell("batch+dropout:0.5"), tmp_path / name) for name in "ab")
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert first["test"] == second["test"]
    assert lines(tmp_path / "a") != (run(cell("batch+dropout:0.5", seed=1), tmp_path / "c"), lines(tmp_path / "c"))[1]


@pytest.mark.parametrize("arm", ["batch+dropout:0.5", "layer+momentum", "none+adamw"])
def test_a_probed_run_equals_one_that_is_not_probed(tmp_path, monkeypatch, arm):
    run(cell(arm), tmp_path / "probed")
    assert len(read_lines(tmp_path / "probed" / "inside.jsonl")) >= 10
    monkeypatch.setattr(train.Probe, "__call__", lambda self, step: None)
    run(cell(arm), tmp_path / "alone")
    assert read_lines(tmp_path / "alone" / "inside.jsonl") == []
    assert lines(tmp_path / "probed") == lines(tmp_path / "alone")


def test_a_probe_that_touched_the_buffers_would_be_caught(tmp_path, monkeypatch):
    """The test above can fail: a probe that forwards in training mode on the model itself moves its statistics."""
    run(cell("batch"), tmp_path / "alone")
    monkeypatch.setattr(train.Probe, "__call__", lambda self, step: step.model(self.batch))
    run(cell("batch"), tmp_path / "touched")
    assert lines(tmp_path / "touched") != lines(tmp_path / "alone")


def test_inside_shows_the_input_of_the_last_activation_and_gradients_thrice(tmp_path):
    run(cell("batch", steps=40), tmp_path)
    inside = read_lines(tmp_path / "inside.jsonl")
    assert [line["step"] for line in inside] == moments(40)
    assert {line["unit"]["layer"] for line in inside} == {"2"}
    for line in inside:
        low, middle, high = line["unit"]["percentiles"]
        assert low <= middle <= high
    assert [line["step"] for line in inside if "gradient_norms" in line][::2] == [1, 40]
    assert set(inside[0]["gradient_norms"]) == {"0.weight", "4.weight"}
    built, _ = build_model(tiny(), parse_arm("batch"), 0)
    data = seeded_data(tiny(), 0)
    seen = activation_inputs(built, data.validation.first(512)[0])["2"]
    assert torch.allclose(seen.mean(0), torch.zeros(8), atol=1e-5)  # batch norm in training mode: by this batch


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 2000])
def test_moments_begin_with_the_first_and_end_with_the_last_step(steps):
    found = moments(steps)
    assert (found[0], found[-1]) == (1, steps)
    assert found == sorted(set(found))
    assert len(found) <= 62


class Killed(BaseException):
    """Stands in for kill -9: nothing in the loop can catch it."""


class KillAt:
    def __init__(self, *steps):
        self.steps = set(steps)

    def __call__(self, step):
        if step.number in self.steps:
            raise Killed


@pytest.mark.parametrize("arm", ["batch+dropout:0.5", "batch+momentum", "rms+adamw", "dyt"])
@pytest.mark.parametrize("kills", [(1,), (5,), (4, 9, 10, 23), (24,)])
def test_an_interrupted_run_continues_bit_for_bit(tmp_path, arm, kills):
    whole = run(cell(arm), tmp_path / "whole")
    for kill in kills:
        with pytest.raises(Killed):
            run(cell(arm), tmp_path / "killed", replace(tiny(), between_steps=[KillAt(kill)]), seconds=0)
        torch.manual_seed(12345)  # the next process begins with other global state
    resumed = run(cell(arm), tmp_path / "killed", replace(tiny(), between_steps=[KillAt()]), seconds=0)
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    assert lines(tmp_path / "killed", "inside.jsonl") == lines(tmp_path / "whole", "inside.jsonl")
    measured = ("state", "steps", "steps_to_target", "best_validation", "test", "parameters", "dead_units")
    assert {key: resumed[key] for key in measured} == {key: whole[key] for key in measured}
    assert resumed["variance_ratio"] == whole["variance_ratio"]


def test_training_seconds_add_up_over_attempts_and_start_from_the_checkpoint(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(
        checkpoint, "save", lambda place, content, save=checkpoint.save: (saved.append(content), save(place, content))
    )
    with pytest.raises(Killed):
        run(cell(), tmp_path, replace(tiny(), between_steps=[KillAt(20)]), seconds=0)
    resumed = run(cell(), tmp_path, replace(tiny(), between_steps=[KillAt()]), seconds=1e9)
    before = saved[-1]["state"]
    assert 0 < before["step"] < 20
    seconds = [line["seconds"] for line in read_lines(tmp_path / "metrics.jsonl")]
    assert seconds == sorted(seconds)
    assert resumed["train_seconds"] > before["train_seconds"] > 0


def test_a_damaged_checkpoint_costs_the_run_its_progress_and_nothing_else(tmp_path, caplog):
    run(cell(), tmp_path / "whole")
    with pytest.raises(Killed):
        run(cell(), tmp_path / "killed", replace(tiny(), between_steps=[KillAt(20)]), seconds=0)
    path = tmp_path / "killed" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:200])
    run(cell(), tmp_path / "killed")
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    assert "cannot be read" in caplog.text


def test_a_checkpoint_behind_the_end_of_its_journal_is_not_believed(tmp_path):
    run(cell(), tmp_path / "whole")
    with pytest.raises(Killed):
        run(cell(), tmp_path / "killed", replace(tiny(), between_steps=[KillAt(20)]), seconds=0)
    (tmp_path / "killed" / "inside.jsonl").write_bytes(b"")  # a power cut lost it
    run(cell(), tmp_path / "killed", replace(tiny(), between_steps=[KillAt()]))
    for name in ("metrics.jsonl", "inside.jsonl"):
        assert lines(tmp_path / "killed", name) == lines(tmp_path / "whole", name)


class Counter:
    """An actor between steps with a state of its own, which scales the gradient-free weights as it goes."""

    def __init__(self):
        self.count = 0

    def __call__(self, step):
        self.count += 1
        with torch.no_grad():
            next(step.model.parameters()).mul_(1 - 0.001 * self.count)

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_who_acts_between_steps_changes_the_model_and_is_resumed_with_it(tmp_path):
    acting = replace(tiny(), between_steps=[Counter(), KillAt()])
    run(cell(), tmp_path / "untouched")
    run(cell(), tmp_path / "whole", acting)
    assert lines(tmp_path / "whole") != lines(tmp_path / "untouched")
    with pytest.raises(Killed):
        run(cell(), tmp_path / "killed", replace(tiny(), between_steps=[Counter(), KillAt(17)]), seconds=0)
    run(cell(), tmp_path / "killed", acting)
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


def test_a_search_run_stops_at_the_target_and_sees_no_test_data(tmp_path):
    asked = cell("batch", phase="search", lr=1.0, steps=400)
    data = as_data(seeded_data(tiny(), 0))
    forbidden = data._replace(test=None)
    found = train.train(asked, tiny(), forbidden, tmp_path, 1e9)
    assert found["steps"] == found["steps_to_target"] < 400
    assert found["test"] is None
    assert found["best_validation"] >= 0.8
    assert read_lines(tmp_path / "inside.jsonl") == []


def test_a_final_run_takes_all_its_steps_and_remembers_when_it_was_there(tmp_path):
    found = run(cell("batch", lr=1.0, steps=60), tmp_path)
    metrics = read_lines(tmp_path / "metrics.jsonl")
    first = next(line for line in metrics if line["validation"] >= 0.8)
    assert found["steps"] == metrics[-1]["step"] == 60
    assert found["steps_to_target"] == first["step"] < 60
    assert found["seconds_to_target"] == pytest.approx(first["seconds"], abs=2e-6)
    assert [line["step"] for line in metrics] == list(range(4, 61, 4))


def test_a_run_that_never_gets_there_is_censored(tmp_path):
    found = run(cell("none", lr=1e-6), tmp_path)
    assert (found["state"], found["steps_to_target"], found["seconds_to_target"]) == ("done", None, None)


@pytest.mark.parametrize(("lr", "words"), [(1e4, "the loss rose to"), (1e30, "the loss became")])
def test_divergence_is_recorded_with_its_step(tmp_path, lr, words):
    found = run(cell("none", lr=lr, target=0.0), tmp_path, diverging())
    assert found["state"] == "diverged"
    assert words in found["reason"]
    assert f"at step {found['steps']}" in found["reason"]
    assert found["steps"] < 24


def test_dead_units_are_counted_over_the_whole_test_set():
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU())
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0], [-1, 0], [0, 0], [0, 0]]))
        net[0].bias.copy_(torch.tensor([0.0, 0, -1, 1]))
    test = as_data(((torch.tensor([[1.0, 0], [-1.0, 0]]), torch.zeros(2)),) * 3).test
    assert closing.dead_units(net, test) == 0.25  # the third unit; the second is alive for one of the samples
    assert closing.dead_units(nn.Sequential(nn.Linear(2, 4), nn.Sigmoid()), test) is None


def test_a_channel_is_dead_when_it_is_zero_everywhere_and_a_module_called_twice_has_two_layers():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.activation = nn.ReLU()

        def forward(self, x):
            return self.activation(-self.activation(x) - 1)

    x = torch.zeros(3, 2, 4, 4)
    x[1, 1, 2, 3] = 1
    test = as_data(((x, torch.zeros(3)),) * 3).test
    assert closing.dead_units(nn.ReLU(), test) == 0.5
    assert closing.dead_units(Twice(), test) == 0.75


def test_the_variance_ratio_is_one_without_dropout_and_below_one_with_it():
    net = model(NormLayer("none"), dropout=0.0, placement="after")
    x = torch.randn(4096, 6)
    (plain,) = closing.variance_ratios(net, x).values()
    assert plain == pytest.approx(1.0, rel=1e-6)
    behind = nn.Sequential(nn.Dropout(0.5), NormLayer("batch")(6))
    (ratio,) = closing.variance_ratios(behind, x).values()
    assert ratio == pytest.approx(0.5, rel=0.05)  # var(x * mask / keep) = var(x) / keep for a centred x


def test_measuring_leaves_the_model_and_the_generators_alone():
    net = model(NormLayer("batch"), dropout=0.5)
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    closing.variance_ratios(net, torch.randn(64, 6, generator=torch.Generator().manual_seed(1)))
    activation_inputs(net, torch.ones(64, 6))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_the_share_of_norms_compares_with_identities_in_their_place():
    net, asked = model(NormLayer("batch")), []

    def take_step(replica):
        kinds = {type(norm).__name__ for norm in norms_of(replica).values()} or {"Identity"}
        asked.append(kinds.pop())
        return 3.0 if asked[-1] == "BatchNorm1d" else 2.0

    assert closing.norm_share(net, take_step) == pytest.approx(1 / 3)
    assert set(asked) == {"BatchNorm1d", "Identity"}
    assert isinstance(net[1], nn.BatchNorm1d)
    assert closing.norm_share(model(NormLayer("none")), take_step) == 0.0


def test_a_run_reports_what_it_cost(tmp_path):
    found = run(cell("batch"), tmp_path)
    assert found["parameters"] == 6 * 8 + 8 + 16 + 8 * 2 + 2
    assert found["train_seconds"] > 0
    assert found["ms_per_step"] > 0
    assert 0 <= found["norm_share"] < 1
    assert math.isfinite(found["dead_units"])
    assert found["variance_ratio"] is None


@pytest.mark.parametrize(
    ("experiment", "arm", "words"),
    [
        (ignores_norms(), "batch", "never called norm_layer"),
        (
            takes_no_dropout(),
            "batch+dropout:0.2",
            r"needs `dropout`, but the model builder of bare takes \(norm_layer\)",
        ),
        (takes_no_dropout(), "batch+placement:after", "needs `placement`"),
        (tiny(), "group:3", "arm 'group:3': the network of tiny cannot be built.*\\(8\\) must be divisible"),
        (replace(tiny(), model=lambda norm_layer: 3), "batch", "returned int; expected a torch.nn.Module"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused_before_training(experiment, arm, words):
    with pytest.raises(LabError, match=rf"(?s){words}"):
        check_arms(experiment, (parse_arm(arm),))
