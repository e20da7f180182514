"""The grammar of arms and of sweeps: what can be written, and what is said about what cannot."""

from __future__ import annotations

import pytest
import torch

from normkit import strategies
from normkit.lab import LabError
from normkit.lab.arm import Arm, parse_arm, parse_arms
from normkit.lab.build import check_arms
from normkit.lab.experiment import Experiment
from normkit.lab.knob import make_sweep, parse_sweep, parse_value
from normkit.lab.parallel import Parallel, cores, parse_parallel


@pytest.mark.parametrize(
    ("text", "arm"),
    [
        ("none", Arm("none")),
        ("batch", Arm("batch")),
        ("group:8", Arm("group:8")),
        ("none+adamw", Arm("none", optimizer="adamw")),
        ("batch+momentum", Arm("batch", optimizer="momentum")),
        ("batch+sgd+momentum", Arm("batch", optimizer="momentum")),
        ("batch + dropout:0.2", Arm("batch", dropout=0.2)),
        ("batch+placement:after", Arm("batch", placement="after")),
        ("none+init:0.1", Arm("none", init=0.1)),
        ("adamw+layer+init:2+dropout:.5", Arm("layer", optimizer="adamw", init=2.0, dropout=0.5)),
        ("batch+scale:0.1+ffn:batch", Arm("batch", choices=(("ffn", "batch"), ("scale", 0.1)))),
        ("progressive:400+qk:rms", Arm("progressive:400", choices=(("qk", "rms"),))),
        (
            "layer->rms@50%+qk:rms",
            Arm("layer", strategy=str(strategies.parse("rms@50%")), choices=(("qk", "rms"),)),
        ),
    ],
)
def test_an_arm_reads_as_it_is_written(text, arm):
    assert parse_arm(text) == arm
    assert parse_arm(arm.name) == arm  # the name is the arm in its own grammar


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bach", "did you mean.*batch"),
        ("batch+adamm", "unknown.*'adamm'.*did you mean 'adamw'"),
        ("batch+qk:", "'qk:' is no key:value"),
        ("layer+qk:rms+qk:layer", "gives qk twice"),
        ("gruop:8", "did you mean.*group"),
        ("batch+dropout:1", "dropout:1 is no probability"),
        ("batch+dropout:a", "dropout:a is no number"),
        ("batch+dropout", "dropout needs a value, e.g. dropout:0.2"),
        ("batch+dropout:.1+dropout:.2", "gives dropout twice"),
        ("batch+placement:behind", "neither placement:before nor placement:after"),
        ("none+init:0", "init:0 is no gain"),
        ("none+init:nan", "init:nan is no gain"),
        ("batch+sgd+adamw", "names 2 optimizers"),
        ("adamw", "names no norm; write none\\+adamw"),
        ("batch+", "empty part"),
        ("group:0", "group:0"),
    ],
)
def test_a_wrong_arm_gets_one_sentence_that_says_what_to_write(text, words):
    with pytest.raises(LabError, match=words):
        parse_arm(text)


def test_what_else_an_arm_chooses_goes_to_the_model_builder_by_name():
    asked = []

    def model(norm_layer, scale=1.0):
        asked.append(scale)
        return norm_layer(4)

    experiment = Experiment(model=model, data=lambda seed: None, target=0.5)
    check_arms(experiment, parse_arms("batch, batch+scale:0.1, rep"))
    assert asked == [1.0, 0.1, 1.0]
    with pytest.raises(LabError, match=r"needs `scaled`; did you mean 'scale'.*takes \(norm_layer, scale\)"):
        check_arms(experiment, parse_arms("batch+scaled:0.1"))
    with pytest.raises(LabError, match="needs `droput`; did you mean 'dropout'"):
        check_arms(experiment, parse_arms("batch+droput:0.2"))


def test_a_choice_is_in_the_record_only_where_one_was_made():
    assert "choices" not in parse_arm("batch").record("sgd")
    assert parse_arm("batch+scale:0.1").record("sgd")["choices"] == {"scale": 0.1}


def test_arms_come_from_a_line_or_a_list_and_each_once():
    assert [arm.name for arm in parse_arms("none, batch,none+adamw")] == ["none", "batch", "none+adamw"]
    assert parse_arms(["none", Arm("batch")]) == (Arm("none"), Arm("batch"))
    for wrong, words in ((" , batch", "empty place"), ("none,none", "given 2 times"), ([], "no arms")):
        with pytest.raises(LabError, match=words):
            parse_arms(wrong)


def test_an_arm_is_recorded_with_the_optimizer_it_really_has():
    assert parse_arm("batch").record("sgd")["optimizer"] == "sgd"
    assert parse_arm("batch+adamw").record("sgd") == {
        "name": "batch+adamw",
        "norm": "batch",
        "optimizer": "adamw",
        "placement": "before",
        "dropout": 0.0,
        "init": 1.0,
    }


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("batch-size=2..256", (2, 4, 8, 16, 32, 64, 128, 256)),
        ("batch_size=2,8,32", (2, 8, 32)),
        ("init=0.01..10", (0.01, 0.032, 0.1, 0.32, 1.0, 3.2, 10.0)),
        ("dropout=0,.1,.2,.5", (0, 0.1, 0.2, 0.5)),
        ("depth=10..200", (10, 21, 45, 95, 200)),
        ("skip=true,false", (True, False)),
    ],
)
def test_a_sweep_is_a_list_or_a_log_spaced_range(text, values):
    sweep = parse_sweep(text)
    assert sweep.values == values
    assert sweep.knob == text.split("=")[0].replace("_", "-")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("depth", "write knob=values"),
        ("depth=", "write knob=values"),
        ("depth=5..2", "0 < low < high"),
        ("init=0..1", "0 < low < high"),
        ("dropout=0,1", "lies in 0 <= dropout < 1"),
        ("init=0,1", "positive factor"),
        ("batch-size=2.5,4", "whole numbers"),
        ("depth=1,,2", "empty value"),
        ("depth=" + ",".join(map(str, range(1, 20))), "at most 12"),
    ],
)
def test_a_wrong_sweep_says_what_to_write(text, words):
    with pytest.raises(LabError, match=words):
        parse_sweep(text)


def test_a_sweep_knows_whose_knob_it_turns():
    assert make_sweep("depth", [4, 8]).option == "depth"
    assert make_sweep("init", [1, 2]).option is None
    assert make_sweep("batch-size", [4, 8, 4]).values == (4, 8)
    assert [parse_value(word) for word in ("3", "0.5", "true", "rows")] == [3, 0.5, True, "rows"]


def test_threads_divide_the_cores_and_never_exceed_what_torch_was_told(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10**6)
    assert Parallel("sequential", 1).threads == cores()
    assert Parallel("loky", cores()).threads == Parallel("loky", 3 * cores()).threads == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert Parallel("sequential", 1).threads == 1


def test_parallel_names_a_backend_and_a_number_of_workers():
    assert parse_parallel("loky") == Parallel("loky" if cores() > 1 else "sequential", cores())
    assert parse_parallel("1") == Parallel("sequential", 1)
    assert parse_parallel("3") == parse_parallel("loky:3") == Parallel("loky", 3)
    assert parse_parallel("dask:4") == Parallel("dask", 4)
    for wrong in ("lokky", "0", "loky:0", "loky:x", "mpi"):
        with pytest.raises(LabError, match="--parallel"):
            parse_parallel(wrong)


@pytest.mark.parametrize(
    ("text", "arm"),
    [
        ("batch:renorm:3:5:50+running:0.02", Arm("batch:renorm:3:5:50", running=0.02)),
        ("batch:synchronized+processes:2", Arm("batch:synchronized", processes=2)),
    ],
)
def test_policies_and_what_goes_with_them_are_part_of_an_arm(text, arm):
    assert parse_arm(text) == arm
    assert arm.name == text
    assert parse_arm(text).record("sgd").keys() - Arm().record("sgd").keys() <= {"running", "processes"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch+running:0", "running:0 is no share"),
        ("batch+running:nan", "running:nan is no share"),
        ("batch+processes:0", "processes:0 is no number of processes"),
        ("batch+processes:1.5", r"processes:1\.5 is no number of processes"),
        ("batch+processes:inf", "processes:inf is no number of processes"),
        ("batch:goast:4", "did you mean 'ghost'"),
    ],
)
def test_a_wrong_share_or_number_of_processes_is_named(text, words):
    with pytest.raises(LabError, match=words):
        parse_arm(text)


@pytest.mark.parametrize(
    ("text", "norm", "strategy"),
    [
        ("batch->frozen@25%+lr/10", "batch", "frozen@25% lr/10"),
        ("batch -> frozen@25% lr/10", "batch", "frozen@25% lr/10"),
        ("batch@0-50%->group:8@50%", "batch", "group:8@50%"),
        ("taper@20-60%", "batch", "taper@20%-60%"),
        ("batch->frozen@25%+lr/10->batch@50%+rewarm:5+adamw", "batch", "frozen@25% lr/10 -> batch@50% rewarm:5"),
        ("select@50%", "switchable", "select@50%"),
        ("layer->rms@50%+dropout:0.1", "layer", "rms@50%"),
    ],
)
def test_an_arm_may_change_its_norms_while_it_trains(text, norm, strategy):
    arm = parse_arm(text)
    assert (arm.norm, arm.strategy) == (norm, strategy)
    assert parse_arm(arm.name) == arm
    assert arm.record("sgd")["strategy"] == strategy
    assert "strategy" not in parse_arm("batch").record("sgd")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch->frozen", "does not say when"),
        ("frozen@10%+taper@1-2%", "2 strategies; join their phases by ->"),
        ("batch->grup:8@50%", "grup"),
        ("batch->frozen@25%+lr*3", "unknown: 'lr"),
    ],
)
def test_a_strategy_that_cannot_be_read_is_an_error_of_the_arm(text, message):
    with pytest.raises(LabError, match=message):
        parse_arm(text)
