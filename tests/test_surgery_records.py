"""Committed records of surgery: every number of a table follows from the runs in the record."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


def made_by(name: str) -> ModuleType:
    """The program that made a record."""
    source = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    return module


def record(name: str) -> dict:
    return json.loads((ROOT / "records" / "surgery" / f"{name}.json").read_text())


def test_the_answer_on_converting_follows_from_the_runs():
    program, found = made_by("converted_norms"), record("convert")
    assert found["summary"] == [program.summary(row["to"], row["way"], found["runs"]) for row in found["summary"]]
    ways = [("batch", "not converted"), *((to, way) for to in program.TARGETS for way in ("carried", "matched"))]
    told = {(run["to"], run["way"], run["seed"]) for run in found["runs"]}
    assert told == {(*way, seed) for way in ways for seed in program.SEEDS}
    assert len(found["runs"]) == len(told)


def test_the_answer_on_calibrating_follows_from_the_runs():
    program, found = made_by("calibrated_averages"), record("calibrate")
    assert found["summary"] == [program.summary(row["weights"], found["runs"]) for row in found["summary"]]
    assert len(found["runs"]) == len(program.SEEDS) * 5


def test_the_answer_on_taking_norms_out_follows_from_the_runs():
    program, found = made_by("normalizer_free"), record("normalizer-free")
    assert found["summary"] == [program.summary(way, found["runs"]) for way in program.WAYS]
    assert len(found["runs"]) == len(program.SEEDS) * len(program.WAYS)
    assert [one["seed"] for one in found["resnet50"]] == [*program.DRAWN]
    assert {len(one["variances"]) for one in found["resnet50"]} == {16}
    told = [*found["resnet50"], *(run for run in found["runs"] if run["way"] != "batch")]
    assert all(0.5 <= variance <= 2 for one in told for variance in one["variances"])


@pytest.mark.parametrize(
    ("name", "program"),
    [
        ("convert", "converted_norms"),
        ("calibrate", "calibrated_averages"),
        ("normalizer-free", "normalizer_free"),
    ],
)
def test_the_command_in_the_record_is_that_of_the_program(name, program):
    command = record(name)["command"]
    assert command == f"python examples/{program}.py records/surgery/{name}.json"
    assert command in made_by(program).__doc__


def test_what_the_pages_say_of_the_tables():
    converted = {(row["to"], row["way"]): row for row in record("convert")["summary"]}
    for to in ("group:auto", "group:4", "layer", "dyt"):
        assert converted[to, "carried"]["converted"]["greatest"] < 0.3
        assert converted[to, "matched"]["converted"]["mean"] > 0.85
        assert converted[to, "matched"]["after one epoch at 0.003"]["mean"] > 0.93
    calibrated = {row["weights"]: row for row in record("calibrate")["summary"]}
    for weights in ("SWA", "EMA"):
        assert calibrated[weights]["calibrate_, equal batches"]["least"] > calibrated[weights]["as it is"]["mean"]
    for weights in ("EMA, buffers too", "annealed"):
        gain = calibrated[weights]["calibrate_, equal batches"]["mean"] - calibrated[weights]["as it is"]["mean"]
        assert abs(gain) < 0.005
