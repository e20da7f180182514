"""Committed records: every number of an answer follows from the runs in the record, and the pages say that answer."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from normkit.lab.analyse.intervals import Finish, mean_interval, median_finish, paired_difference, paired_ratio
from normkit.report.words import verdict

ROOT = Path(__file__).parent.parent
RECORDS = sorted((ROOT / "records" / "compare").glob("*"))
SWEEPS = ("small-batches", "cut-batches")
"""Over the batch size, with a budget that their page states."""
STRATEGIES = ("strategies", "strategies-text", "strategies-deep")
"""With a budget that their page states; every other record is a thorough comparison."""
ADVERSARIAL = ("gan-ring",)
"""With ten seeds at least; the task has an option, so that its name is not the record's."""
ASKED = {
    "digits-sequence-permuted": "digits-sequence --set permuted=true",
    "digits-sequence-pixels": "digits-sequence --set unit=pixels "
    "--arms 'none, batch+scale:0.1, batch+scale:1, batch+where:input, layer'",
    "text": "text --arms 'layer, layer+qk:rms, layer+qk:layer, rms, rms+qk:rms, batch, batch+qk:rms, batch+ffn:batch, "
    "power:10%, rep, progressive:50%:10%, layer+placement:after, batch+placement:after, none, none+qk:rms'",
    "digits-vit": "digits-vit --arms 'layer, layer+qk:rms, rms, batch, batch+qk:rms, batch+ffn:batch, power:10%, rep, "
    "progressive:50%:10%, none'",
    "data-size": "data-size --sweep share=0.01,0.1,1",
    "deep-residual": "digits-deep --arms 'none, none+residual:none, batch, batch+residual:none, layer, "
    "none+residual:skipinit, none+residual:fixup, none+residual:normalizer-free, "
    "none+residual:normalizer-free+clip:0.02' --sweep depth=10,50,200 --search-seeds 1",
    "variants": "variants --arms 'none, batch, layer, rms, group:4, instance, switchable, frn:tlu, evonorm_s0:4, dyt, "
    "power:20, evonorm_b0, grn, derf' --sweep batch-size=4,64",
    "gan-ring-thorough": "gan",
    "gan-digits": "gan --data digits",
}
"""Thorough comparisons of more arms than the usual ones, or whose record has another name than the task."""
THOROUGH = "-thorough"
"""The default arms with all seeds, beside a record of more arms or steps with fewer."""
PAGES = {
    **dict.fromkeys(SWEEPS, "docs/small-batches.md"),
    **dict.fromkeys(STRATEGIES, "docs/strategies.md"),
    **dict.fromkeys(
        (
            "deep-residual",
            "digits-sequence",
            "digits-sequence-pixels",
            "digits-sequence-permuted",
            "variants",
            "data-size",
        ),
        "docs/what-works-where.md",
    ),
    **dict.fromkeys((*ADVERSARIAL, "gan-ring-thorough", "gan-digits"), "docs/conditional-and-gan.md"),
    **dict.fromkeys(("text", "digits-vit"), "docs/recurrent-and-attention.md"),
}
"""Where the others are shown; the thorough ones are in the README, answer and picture."""
COMMITTED = {"summary.json", "report.html", "report.md", "picture.svg"}


@pytest.fixture(params=RECORDS, ids=lambda path: path.name)
def record(request) -> Path:
    return request.param


def summary(record: Path) -> dict:
    return json.loads((record / "summary.json").read_text(encoding="utf-8"))


def finals(content: dict, arm: str, knob: object) -> list[dict]:
    """The final runs of an arm that have an outcome, in the order of their seeds."""
    runs = [run for run in content["runs"] if _is(run, arm, knob, "final")]
    return sorted((run for run in runs if run["state"] in ("done", "diverged")), key=lambda run: run["seed"])


def steps(run: dict, budget: int) -> Finish:
    return Finish(run["steps_to_target"], float(budget))


def seconds(run: dict, budget: int) -> Finish:
    return Finish(run["seconds_to_target"], run["train_seconds"] * max(1.0, budget / run["steps"]))


def test_the_three_records_of_the_readme_are_there():
    assert {"digits", "digits-relu", "digits-cnn"} <= {path.name for path in RECORDS}


def test_the_sweeps_over_the_batch_size_are_there():
    assert set(SWEEPS) <= {path.name for path in RECORDS}


def test_a_record_is_a_run_that_its_command_makes_again_and_four_small_files(record):
    experiment = summary(record)["experiment"]
    assert {path.name for path in record.iterdir()} == COMMITTED
    assert len(experiment["seeds"]) >= 5
    if record.name in SWEEPS:
        assert experiment["budget"] == "default"
        assert re.match(r"normkit compare digits-cnn --arms .* --sweep batch-size=", experiment["command"])
        assert f"--out records/compare/{record.name}" not in experiment["command"]  # the runs themselves are elsewhere
    elif record.name in STRATEGIES:
        assert re.search(r"--seeds \d+ --search-seeds 1", experiment["command"])
        assert "--out" not in experiment["command"]
    elif record.name in ADVERSARIAL:
        assert experiment["command"].startswith(f"normkit compare gan --data {record.name.removeprefix('gan-')}")
        assert len(experiment["seeds"]) >= 10
    else:
        assert experiment["budget"] == "thorough"
        asked = ASKED.get(record.name, record.name.removesuffix(THOROUGH))
        assert experiment["command"] == f"normkit compare {asked} --thorough"
    assert (record / "report.html").stat().st_size < 2_000_000
    assert sum(path.stat().st_size for path in record.iterdir()) < 4_000_000


def test_every_number_of_the_answer_follows_from_the_runs(record):
    content = summary(record)
    assert len(content["points"]) == len((content["experiment"]["sweep"] or {"values": [None]})["values"])
    for point in content["points"]:
        _follows_from_the_runs(content, point)


def _follows_from_the_runs(content: dict, point: dict) -> None:
    experiment, knob = content["experiment"], point["knob"]
    budget = experiment["steps"]
    if knob is not None and experiment["sweep"]["knob"] == "batch-size":  # equal samples
        budget = round(budget * experiment["batch_size"] / knob)
    base, higher = finals(content, experiment["baseline"], knob), experiment["metric"]["higher_is_better"]
    for arm in point["arms"]:
        mine = finals(content, arm["name"], knob)
        assert all(run["steps"] == budget for run in mine if run["state"] == "done")
        assert len(mine) == arm["runs"]["finished"] == len(content["experiment"]["seeds"])
        assert {run["lr"] for run in mine} == {arm["lr"]}
        assert arm["steps_to_target"] == median_finish([steps(run, budget) for run in mine])
        assert arm["seconds_to_target"] == median_finish([seconds(run, budget) for run in mine])
        tests = [run["test"] for run in mine if run["test"] is not None]
        assert (arm["test"]["mean"], arm["test"]["low"], arm["test"]["high"]) == mean_interval(tests)
        for key in ("test_exact", "test_batch"):
            other = [(run["test"], run[key]) for run in mine if run.get(key) is not None and run["test"] is not None]
            if other:
                expected = paired_difference([running for running, _ in other], [own for _, own in other], higher)
                assert arm[key]["difference"] == expected
                assert arm[key]["mean"] == mean_interval([own for _, own in other])[0]
        if arm["name"] == content["experiment"]["baseline"]:
            continue
        assert [run["seed"] for run in mine] == [run["seed"] for run in base]
        for key, read in (("steps_ratio", steps), ("seconds_ratio", seconds)):
            assert arm[key] == paired_ratio([read(run, budget) for run in base], [read(run, budget) for run in mine])
        pairs = [(b["test"], a["test"]) for b, a in zip(base, mine, strict=True) if None not in (a["test"], b["test"])]
        assert arm["test_difference"] == paired_difference([b for b, _ in pairs], [a for _, a in pairs], higher)


def test_every_arm_of_a_record_was_searched_alike_and_on_other_seeds(record):
    content = summary(record)
    for point in content["points"]:
        trials = {
            arm["name"]: sorted(
                (run["lr"], run["seed"]) for run in content["runs"] if _is(run, arm["name"], point["knob"], "search")
            )
            for arm in content["experiment"]["arms"]
        }
        assert len({tuple(found) for found in trials.values()}) == 1
        found = next(iter(trials.values()))
        assert len({rate for rate, _ in found}) >= 7
        assert not {seed for _, seed in found} & set(content["experiment"]["seeds"])


def _is(run: dict, arm: str, knob: object, phase: str) -> bool:
    return (run["arm"], run["knob"], run["phase"]) == (arm, knob, phase)


def test_the_pages_say_the_answer_of_the_record(record):
    answer = verdict(summary(record))
    assert f"**{answer}**" in re.sub(r"\\(.)", r"\1", (record / "report.md").read_text(encoding="utf-8"))
    page = re.sub(r"<[^>]+>", "", (record / "report.html").read_text(encoding="utf-8"))
    assert answer in page.replace("\N{NO-BREAK SPACE}", " ")
    shown = (ROOT / PAGES.get(record.name, "README.md")).read_text(encoding="utf-8")
    assert record.name in PAGES or answer in shown
    assert f"records/compare/{record.name}/picture.svg" in shown
