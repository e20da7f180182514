"""normkit doctor and normkit explain RULE: the answer first, the next command last, the status in between."""

from __future__ import annotations

import json

import pytest
import torch

from normkit.rules import RULES
from test_cli import answered, refused, run  # noqa: F401  # run is a fixture

SOURCE = """
import torch
from torch import nn

def sound():
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(392, 4))

def sick():
    model = sound()
    model[1].momentum = 0.99
    return model

def optimizer(model):
    return torch.optim.AdamW(model.parameters())

def batches():
    generator = torch.Generator().manual_seed(0)
    yield torch.randn(32, 3, 9, 9, generator=generator), torch.randint(4, (32,), generator=generator)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(SOURCE)
    return path


def test_a_sound_model_is_clean(run, file):  # noqa: F811
    status, output, _ = run("doctor", f"{file}:sound", "--input", "3,9,9")
    assert status == 0
    assert output.startswith("nothing wrong was found")
    assert output.splitlines()[-1].startswith("next: normkit ")


@pytest.mark.parametrize(
    ("words", "status"), [((), 1), (("--fail-on", "warn"), 1), (("--fail-on", "error"), 0), (("--fail-on", "never"), 0)]
)
def test_the_status_says_whether_something_was_found(run, file, words, status):  # noqa: F811
    found, output, _ = run("doctor", f"{file}:sick", *words)
    assert found == status
    assert output.startswith("1 warning: 1 batch norm has momentum 0.99")
    assert output.splitlines()[-1] == "next: normkit explain momentum_reversed"


def test_everything_that_is_given_is_asked_about(run, file):  # noqa: F811
    words = ["--data", f"{file}:batches", "--loss", "cross_entropy", "--optimizer", f"{file}:optimizer", "--json"]
    status, output, _ = run("doctor", f"{file}:sound", *words)
    data = json.loads(output)
    assert status == 0
    assert [finding["rule"] for finding in data["findings"]] == ["norm_parameters_decay"]
    assert {reading["quantity"] for reading in data["readings"]} >= {"gradient_growth", "loss_running", "batch_noise"}
    assert all("watch" in reason for reason in data["not_asked"].values())


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_an_exported_program_is_diagnosed(run, tmp_path, training):  # noqa: F811
    from torch import nn

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(392, 4))
    program = torch.export.export(model.train(training), (torch.randn(2, 3, 9, 9),))
    torch.export.save(program, tmp_path / "net.pt2")
    status, output, _ = run("doctor", str(tmp_path / "net.pt2"), "--input", "3,9,9", "--json")
    data = json.loads(output)
    rules = [finding["rule"] for finding in data["findings"]]
    assert ("exported_in_training" in rules) is training
    assert "bias_before_norm" in rules if training else "unfolded_norms" in rules
    assert status == 1
    assert data["model"]["norms"] == 1
    readings = {(r["quantity"], r["module"]): r["value"] for r in data["readings"]}
    assert readings["values_per_channel", "1"] == 32 * 7 * 7  # another batch than it was exported with
    assert ("dead_share", "2") in readings


def test_rules_are_selected_and_ignored(run, file):  # noqa: F811
    assert run("doctor", f"{file}:sick", "--ignore", "momentum_*")[0] == 0
    assert run("doctor", f"{file}:sick", "--select", "momentum_reversed")[0] == 1


def test_a_checkpoint_is_looked_at_as_it_would_be_deployed(run, file, tmp_path):  # noqa: F811
    from torch import nn

    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(392, 4))
    model[1].running_var[0] = float("nan")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    words = ["--checkpoint", str(tmp_path / "weights.pt"), "--eval", "--fail-on", "error"]
    status, output, _ = run("doctor", f"{file}:sound", *words)
    assert status == 1
    assert "non_finite_statistics" in output


def test_the_page_is_written(run, file, tmp_path):  # noqa: F811
    status, output, _ = run("doctor", f"{file}:sick", "-o", str(tmp_path / "report.html"))
    assert status == 1
    assert f"page: {tmp_path / 'report.html'}" in output
    assert "momentum_reversed" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("{file}:sond",), ["did you mean 'sound'"]),
        (("{file}:sound", "--input", "4,9,9"), ["expected input", "the batch that was given"]),
        (("{file}:sound", "--input", "x"), ["--input 'x' is not a shape"]),
        (("{file}:sound", "--select", "momentum_revrsed"), ["did you mean 'momentum_reversed'"]),
        (("{file}:sound", "--loss", "cross_entropy"), ["--loss wants targets"]),
        (("{directory}",), ["no run was watched there"]),
        (("{directory}/net.pt2",), ["net.pt2: is not there", "torch.export.save"]),
        (("{directory}/net.py.pt2",), ["is no program of torch.export"]),
        (("{directory}/net.pt2", "--eval"), ["--eval goes with a function", "its own weights and modes"]),
        (("{directory}", "--input", "3,9,9"), ["--input goes with a MODEL"]),
    ],
)
def test_what_cannot_be_done_is_said(run, file, tmp_path, words, said):  # noqa: F811
    (tmp_path / "net.py.pt2").write_text(SOURCE)
    words = [word.format(file=file, directory=tmp_path) for word in words]
    told = refused(run("doctor", *words))
    assert all(word in told for word in said)


@pytest.mark.parametrize("name", [next(iter(RULES)), "train_eval_gap"])
def test_explain_tells_a_rule(run, name):  # noqa: F811
    lines = answered(run("explain", name))
    assert lines[0].startswith(f"{name}: ")
    assert lines[-1] == f"next: normkit doctor MODEL --select {name}"
    _, output, _ = run("explain", name, "--json")
    assert json.loads(output)["means"] == RULES[name].means


def test_explain_suggests_the_rule_that_was_meant(run):  # noqa: F811
    assert "did you mean 'train_eval_gap'" in refused(run("explain", "train_evalgap"))
