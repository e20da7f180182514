"""digits-sequence: its arms are what they are called, and the gradient by time step is that of the plain loop."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normkit as nk
from normkit.lab import LabError
from normkit.lab.analyse.against import final_runs, race
from normkit.lab.analyse.curves import state_gradients as over_seeds
from normkit.lab.arm import parse_arm
from normkit.lab.build import build_model
from normkit.lab.cell import Cell
from normkit.lab.load import Source
from normkit.lab.norm_layer import norms_of
from normkit.lab.state_gradients import state_gradients
from normkit.lab.tasks.digits_sequence import ARMS
from normkit.lab.train import train
from normkit.lab.worker import seeded_data
from normkit.report import recurrent
from normkit.report.labels import label
from normkit.report.plots.time_steps import state_gradients as drawn
from normkit.vocabulary.record import Record

ROOT = Path(__file__).parent.parent


def built(arm, **options):
    return build_model(Source("digits-sequence").load(options), parse_arm(arm), 0)[0]


# the arms


def test_the_arms_are_those_of_the_papers():
    nets = {arm: built(arm) for arm in ARMS}
    assert type(nets["none"].layers) is nk.LSTM
    assert nets["none"].layers.norms is None  # torch's operator
    of_cell = lambda arm: nets[arm].layers.norms["l0"]["cell"].norm
    assert [float(of_cell(arm).weight.detach().mean()) for arm in ARMS[1:4]] == pytest.approx([0.1, 1.0, 0.1])
    assert len(of_cell("batch+scale:1").statistics_state.batches) == 8
    assert not hasattr(of_cell("batch+scale:0.1+statistics:shared").statistics, "max_length")
    assert set(nets["batch+where:input"].layers.norms["l0"]) == {"input"}
    assert len(norms_of(built("batch", unit="pixels"))) == 3
    assert len(norms_of(built("batch", unit="pixels"))["layers.norms.l0.cell.norm"].statistics_state.batches) == 64
    assert type(built("layer", cell="gru").layers) is nk.GRU
    assert built("rms", cell="rnn", depth=2).layers.num_layers == 2


def test_the_norm_on_the_input_sees_samples_and_time_steps_together():
    net, seen = built("batch+where:input"), []
    (norm,) = norms_of(net).values()
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    net(torch.randn(5, 8, 8))
    assert seen == [(40, 256)]
    assert float(norm.weight.detach().mean()) == 1


def test_the_first_weights_are_orthogonal_from_state_to_state_and_the_forget_gate_is_open():
    lstm = built("none").layers
    for gate in lstm.weight_hh_l0.detach().split(64):
        assert torch.allclose(gate @ gate.T, torch.eye(64), atol=1e-5)
    assert lstm.bias_ih_l0.tolist() == [0.0] * 64 + [1.0] * 64 + [0.0] * 128
    assert not lstm.bias_hh_l0.any()


@pytest.mark.parametrize("unit", ["rows", "pixels"])
def test_a_permuted_digit_is_the_same_digit_in_another_order(unit):
    plain, permuted, again = (
        seeded_data(Source("digits-sequence").load({"unit": unit} | more), 3).test.first(50)[0]
        for more in ({}, {"permuted": True}, {"permuted": True, "cell": "gru"})
    )
    assert permuted.equal(again)
    assert not permuted.equal(plain)
    assert permuted.flatten(1).sort(1).values.equal(plain.flatten(1).sort(1).values)
    assert all((plain == step[:, None]).all(-1).all(0).any() for step in permuted.unbind(1))  # the same for all samples


@pytest.mark.parametrize(
    ("arm", "options", "words"),
    [
        ("batch", {"cell": "tanh"}, "no cell 'tanh'; choose cell=lstm, cell=gru or cell=rnn"),
        ("batch", {"permuted": "yes"}, "permuted='yes'; choose permuted=true or permuted=false"),
        ("none+scale:1", {}, "scale, statistics and where are about norms inside"),
        ("layer+statistics:shared", {}, r"layer\+statistics:shared: choose batch\+statistics:per_step or"),
        ("batch+where:cell", {}, "where:cell is neither where:all nor where:input"),
    ],
)
def test_what_makes_no_sense_is_refused(arm, options, words):
    with pytest.raises(LabError, match=words):
        built(arm, **options)


# the gradient by time step


def by_hand(net, x, targets):
    """|dL/dh_t| from the formulas: every state has a zero added to it, whose gradient is that of the state."""
    own, zeros = net.layers, [torch.zeros(len(x), 64).double().requires_grad_() for _ in x[0]]
    norms = {} if own.norms is None else own.norms["l0"]

    def normalised(part, z):
        if part not in norms:
            return z
        norm = norms[part].norm
        if isinstance(norm, nk.BatchNorm1d):
            return F.batch_norm(z, None, None, norm.weight, norm.bias, training=True)
        return F.layer_norm(z, z.shape[1:], norm.weight, norm.bias)

    h = c = torch.zeros(len(x), 64).double()
    for step, zero in zip(x.unbind(1), zeros, strict=True):
        gates = normalised("input", step @ own.weight_ih_l0.T) + normalised("hidden", h @ own.weight_hh_l0.T)
        i, f, g, o = (gates + own.bias_ih_l0 + own.bias_hh_l0).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * normalised("cell", c).tanh() + zero
    loss = F.cross_entropy(net.head(h), targets)
    return [float(gradient.norm()) for gradient in torch.autograd.grad(loss, zeros)]


@pytest.mark.parametrize("arm", ["none", "layer", "batch+scale:1"])
def test_the_gradient_by_time_step_is_that_of_the_plain_loop(arm):
    net = built(arm).double().train()
    x, targets = torch.randn(7, 8, 8).double(), torch.arange(7)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = state_gradients(net, x, targets, F.cross_entropy)
    assert found == pytest.approx(by_hand(net, x, targets), rel=1e-9)
    assert all(before[name].equal(value) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert net.layers.on_state is None


def test_of_two_layers_the_upper_one_counts():
    net = built("none", depth=2).double()
    x, targets = torch.randn(4, 8, 8).double(), torch.arange(4)
    upper = nn.LSTM(64, 64, batch_first=True).double()
    upper.load_state_dict({k.replace("_l1", "_l0"): v for k, v in net.layers.state_dict().items() if "_l1" in k})
    alone = built("none", depth=1).double()
    alone.layers.weight_ih_l0 = upper.weight_ih_l0
    alone.layers.weight_hh_l0, alone.head = upper.weight_hh_l0, net.head
    lower = nn.LSTM(8, 64, batch_first=True).double()
    lower.load_state_dict({k: v for k, v in net.layers.state_dict().items() if "_l0" in k})
    wanted = by_hand(alone, lower(x)[0].detach(), targets)
    assert state_gradients(net, x, targets, F.cross_entropy) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("arm", ["none+dropout:0.2", "batch+scale:0.1"])
def test_a_run_that_is_looked_into_is_the_run_that_is_not(arm, tmp_path):
    found = Source("digits-sequence").load({})
    fields = {"steps": 5, "eval_every": 1, "batch_size": 20, "target": 1.0, "threads": 1, "data": "", "code": ""}
    cell = Cell("digits-sequence", parse_arm(arm), found.optimizer, 0.01, 0, "final", **fields)
    lines = []
    for name, experiment in (("seen", found), ("unseen", replace(found, between_steps=()))):
        (tmp_path / name).mkdir()
        status = train(cell, experiment, seeded_data(found, 0), tmp_path / name)
        told = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        lines.append([(line["train_loss"], line["validation_loss"]) for line in told])
        if name == "seen":
            assert [line["step"] for line in status["state_gradients"]] == [1, 3, 5]
            assert all(len(line["norms"]) == 8 for line in status["state_gradients"])
    assert lines[0] == lines[1]


def test_the_median_over_seeds_is_taken_at_each_time_step():
    cells = [
        Record("a", {}, {"state": "done", "state_gradients": [{"step": 1, "norms": [1.0, 8.0]}]}, [], []),
        Record("b", {}, {"state": "done", "state_gradients": [{"step": 1, "norms": ["nan", 2.0]}]}, [], []),
    ]
    assert over_seeds(cells) == [{"step": 1, "norms": [1.0, 5.0]}]
    assert over_seeds([Record("c", {}, {"state": "done"}, [], [])]) is None


# what is told


def arm(name, test, gradients):
    runs = {"reached": 2, "finished": 2, "diverged": 0}
    return {
        "name": name,
        "lr": 0.01,
        "test": {"mean": test, "low": test - 0.01, "high": test + 0.01, "n": 2},
        "test_exact": None,
        "runs": runs,
        "steps_to_target": {"median": 90},
        "ms_per_step": 2.5,
        "state_gradients": [{"step": 1, "norms": gradients}, {"step": 9, "norms": [None, 1.0, 2.0]}],
    }


def run(name, seed, test, steps):
    return {"arm": name, "seed": seed, "phase": "final", "knob": None, "state": "done", "test": test} | {
        "steps_to_target": steps
    }


ABOUT = {"name": "accuracy", "unit": "fraction", "higher_is_better": True}
SUMMARY = {
    "experiment": {
        "metric": ABOUT,
        "target": 0.95,
        "steps": 150,
        "baseline": "none",
        "arms": [{"name": "none"}, {"name": "batch+scale:0.1"}, {"name": "batch+scale:1"}],
    },
    "points": [
        {
            "knob": None,
            "arms": [
                arm("none", 0.9, [0.02, 0.1, 1.0]),
                arm("batch+scale:0.1", 0.97, [0.5, 0.7, 1.0]),
                arm("batch+scale:1", 0.95, [0.1, 0.3, 1.0]),
            ],
        }
    ],
    "runs": [run("batch+scale:0.1", s, 0.97 + 0.001 * s, 60) for s in range(6)]
    + [run("batch+scale:1", s, 0.95, 120 - 6 * s) for s in range(6)],
}


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate_recurrent", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_answers_of_a_record_are_computed_from_its_runs(generate, tmp_path):
    steps = race("batch+scale:1", final_runs(SUMMARY), "batch+scale:0.1", 150)
    assert (steps["verdict"], steps["pairs"]) == ("faster", 6)
    assert steps["value"] == pytest.approx((1.8 * 1.7) ** 0.5, rel=1e-5)  # the median of 120/60, 114/60 ... 90/60
    about = {"environment": {"processor": "P", "torch": "2"}, "seeds": [*range(6)], "rates": {"seeds": [7]}}
    file = tmp_path / "digits-sequence" / "summary.json"
    command = "normkit compare digits-sequence --thorough"
    assert command in generate.recurrent_compared(file, command)
    file.parent.mkdir()
    file.write_text(json.dumps(SUMMARY | {"experiment": SUMMARY["experiment"] | about | {"command": command}}))
    text = generate.recurrent_compared(file, command)
    first = text.splitlines()[0]
    assert first.startswith(
        "- **Batch norm at scale 0.1 against batch norm at scale 1**: test accuracy better (+2.2 points"
    )
    assert first.endswith("1.75× fewer steps [1.50, 2.0] to 95 %.")
    assert "is 0.5 with batch norm at scale 0.1, 0.1 with batch norm at scale 1, 0.02 with no normalization" in text
    assert "| `batch+scale:1` | 0.01 | 95.0 % [94.0, 96.0] | – | 90 | 2 of 2 | 0 of 2 | 2.50 |" in text
    assert "| `none` | 0.02 | – |" in text


def test_the_page_draws_a_curve_per_arm_at_each_step_that_was_looked_at():
    first, last = drawn(SUMMARY, SUMMARY["points"][0], "time")
    assert first.title == "Gradient by time step, behind training step 1"
    assert "batch norm at scale 1 0.100 at the first time step, 1.00 at the last" in first.alternative
    assert first.numbers.rows[1] == ["batch norm at scale 0.1", "0.500", "0.700", "1.00"]
    assert last.numbers.rows[0][1:] == ["–", "1.00", "2.00"]
    assert drawn(SUMMARY, {"arms": [{"name": "none"}]}, "time") == []
    assert label("batch+scale:0.1+statistics:shared") == "batch norm at scale 0.1 with shared statistics"
    assert label("batch+where:input") == "batch norm on the input"
    assert recurrent.QUESTIONS[0] == ("batch+scale:0.1", "batch+scale:1")
