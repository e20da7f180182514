"""Arms with a strategy: they train, they resume bit for bit, and the page tells what they did."""

from __future__ import annotations

import pytest
import torch

from normkit.lab import checkpoint, compare
from normkit.lab.train import Run
from normkit.lab.worker import seeded_data
from normkit.report.details import details
from small_experiments import tiny
from test_lab_train import cell, lines, run

ARMS = ["batch->frozen@25%+lr/10", "batch->group:4@50%", "taper@20-60%", "group:4->batch@50%"]


@pytest.mark.parametrize("arm", ARMS)
def test_a_run_tells_of_its_switches(arm, tmp_path):
    measured = run(cell(arm), tmp_path / "a")
    assert measured["state"] == "done"
    done = measured["switches"]
    assert done
    assert not any("failed" in line for line in done)
    assert all(line["moved_in_training"] is not None for line in done)
    assert measured["ms_per_step_before"] > 0
    assert measured["ms_per_step_after"] > 0
    assert "switches" not in run(cell("batch"), tmp_path / "b")


@pytest.mark.parametrize("arm", ARMS)
def test_a_run_that_is_killed_is_the_run_that_was_not(arm, tmp_path, monkeypatch):
    whole = run(cell(arm), tmp_path / "whole")
    asked, experiment = cell(arm), tiny()
    place = tmp_path / "killed"
    place.mkdir()
    for stop in (5, 11, 17):
        killed = Run(asked, experiment, seeded_data(experiment, 0), place, 1e9)

        def end(step, killed=killed, stop=stop):
            if step.number == stop:
                killed._save()
                raise KeyboardInterrupt

        killed.between_steps.append(end)
        monkeypatch.setattr(checkpoint, "load", _forgetful(checkpoint.load, len(killed.between_steps)))
        with pytest.raises(KeyboardInterrupt):
            killed.go()
        monkeypatch.undo()
    resumed = Run(asked, experiment, seeded_data(experiment, 0), place, 1e9)
    monkeypatch.setattr(checkpoint, "load", _forgetful(checkpoint.load, len(resumed.between_steps)))
    measured = resumed.go()
    assert lines(place) == lines(tmp_path / "whole")
    assert measured["test"] == whole["test"]
    assert measured["switches"] == whole["switches"]


def _forgetful(load, places):
    """The state of those who act between steps has one place more in a run that this test has ended."""

    def loaded(directory):
        saved = load(directory)
        if saved is not None:
            saved["between_steps"] = [*saved["between_steps"], None][:places]
        return saved

    return loaded


@pytest.mark.slow
def test_statistics_of_norms_that_were_folded_away_are_not_measured(tmp_path):
    measured = run(cell("batch->frozen@50%->folded@60%"), tmp_path)
    assert (measured["state"], measured["test_exact"], measured["test_batch"]) == ("done", None, None)


def test_the_answer_says_what_the_strategy_did(tmp_path):
    result = compare(
        tiny(),
        arms="batch, batch->frozen@50%+lr/10",
        budget="quick",
        steps=12,
        seeds=2,
        search_seeds=1,
        parallel=1,
        out=tmp_path / "run",
    )
    words = " ".join(details(result.summary))
    assert "frozen@50% lr/10 switched at step 6 and moved the outputs by" in words
    assert torch.is_grad_enabled()
