"""The tasks about Transformers: what their arms build, that norms fold away at the end, and what is told of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normkit as nk
from normkit.blocks import ProgressiveRepBatchNorm, RepBatchNorm
from normkit.lab import LabError, folded
from normkit.lab.arm import parse_arm, parse_arms
from normkit.lab.build import build_model, check_arms
from normkit.lab.cell import Cell
from normkit.lab.initial import weights_of
from normkit.lab.load import Source
from normkit.lab.norm_layer import NormLayer, norms_of
from normkit.lab.shares import in_steps
from normkit.lab.tasks import tokens
from normkit.lab.train import train
from normkit.lab.worker import seeded_data
from normkit.report import attention, table
from normkit.report.labels import label

SMALL = {
    "text": {"depth": 1, "width": 16, "context": 12},
    "digits-vit": {"depth": 1, "width": 16, "grid": 2},
}
TASKS = [*SMALL]
FIELDS = {"steps": 4, "eval_every": 4, "batch_size": 8, "target": 0.9, "threads": 1, "data": "", "code": ""}


def built(task: str, arm: str, **options):
    experiment = Source(task).load(SMALL[task] | options)
    cell = Cell(task, parse_arm(arm), "adamw", 0.003, 0, "final", **FIELDS)
    return experiment, build_model(experiment, cell.trained_arm, 0)[0]


ARMS = {
    "layer": [nk.LayerNorm] * 3,
    "layer+qk:rms": [nk.LayerNorm, nk.LayerNorm, nk.RMSNorm, nk.RMSNorm, nk.LayerNorm],
    "batch": [nk.BatchNorm1d] * 3,
    "batch+ffn:batch": [nk.BatchNorm1d] * 4,
    "power:10%": [nk.PowerNorm] * 3,
    "rep": [RepBatchNorm] * 3,
    "progressive:50%:10%": [ProgressiveRepBatchNorm] * 3,
    "none": [nk.Identity] * 3,
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_has_the_norms_that_it_names_and_starts_as_the_others(task, arm):
    model = built(task, arm)[1]
    assert sorted(type(norm).__name__ for norm in norms_of(model).values()) == sorted(k.__name__ for k in ARMS[arm])
    assert [layer.norm_first for layer in model.modules() if isinstance(layer, nn.TransformerEncoderLayer)] == [True]
    plain = built(task, "none")[1]
    for name, weight in plain.named_parameters():
        assert weight.equal(model.get_parameter(name)), name


def test_the_weights_of_attention_are_drawn_and_scaled_as_those_of_other_layers():
    experiment, plain = built("text", "none")
    weights = {name.rpartition(".")[2]: weight for name, weight in weights_of(plain)}
    assert {*weights} == {"in_proj_weight", "weight"}
    assert float(built("text", "none", width=64)[1][1].layers[0].self_attn.in_proj_bias.detach().abs().max()) == 0
    twice = build_model(experiment, parse_arm("none+init:2"), 0)[0]
    assert torch.equal(twice[1].layers[0].self_attn.in_proj_weight, 2 * weights["in_proj_weight"])


def test_the_default_arms_can_be_built():
    for task in TASKS:
        experiment = Source(task).load(SMALL[task])
        assert {"layer", "batch"} < {*experiment.arms} <= {*ARMS}
        assert experiment.baseline == "layer"
        steps = [
            Cell(task, arm, "adamw", 0.01, 0, "final", **FIELDS).trained_arm for arm in parse_arms(experiment.arms)
        ]
        check_arms(experiment, tuple(steps))


def test_with_layer_norm_the_trunk_is_torchs():
    shape = tokens.Shape("here", depth=2, width=16, heads=4, tokens=12)
    own = tokens.transformers(shape, causal=True)(NormLayer("layer"), 0.0, "before", "none", "none").eval()
    layer = nn.TransformerEncoderLayer(16, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True)
    twin = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16), enable_nested_tensor=False).eval()
    for name, parameter in own.named_parameters():
        nn.init.normal_(parameter, std=0.3)
        if name != "position":
            twin.get_parameter(name.replace("final", "norm")).data.copy_(parameter.data)
    x = torch.randn(3, 9, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(9)
    assert torch.allclose(own(x), twin(x + own.position[:9], mask, is_causal=True), atol=1e-5)


@pytest.mark.parametrize("arm", ["batch+ffn:batch+qk:layer", "power:1", "progressive:2", "rep+placement:after"])
def test_whatever_the_arm_the_language_model_is_causal_in_evaluation(arm):
    net = built("text", arm)[1]
    characters = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        net(characters)  # the running statistics get somewhere, and the schedules to their end
    changed = characters.clone()
    changed[:, 7] += 1
    before, after = net.eval()(characters), net(changed)
    assert torch.allclose(before[:, :7], after[:, :7], atol=1e-5)
    assert not torch.allclose(before[:, 7:], after[:, 7:], atol=1e-3)


def test_a_share_of_a_run_is_so_many_of_its_steps():
    assert in_steps("progressive:50%:10%", 600) == "progressive:300:60"
    assert in_steps("power:0.1%", 200) == "power:1"
    assert in_steps("progressive:50%:0%", 10) == "progressive:5:0"
    assert in_steps("batch:renorm:3:5:100", 7) == "batch:renorm:3:5:100"
    assert in_steps(0.5, 7) == 0.5
    arm = parse_arm("progressive:50%:10%+ffn:power:20%+qk:rms")
    cell = Cell("text", arm, "adamw", 0.01, 0, "final", **FIELDS | {"steps": 200})
    assert cell.trained_arm.norm == "progressive:100:20"
    assert dict(cell.trained_arm.choices) == {"ffn": "power:40", "qk": "rms"}
    assert cell.config()["arm"]["name"] == arm.name == "progressive:50%:10%+ffn:power:20%+qk:rms"
    with pytest.raises(LabError, match="layer_norm takes no value after a colon"):
        parse_arm("layer:10%")


def test_the_norms_beside_the_arms_own_keep_what_is_theirs():
    layer = NormLayer("batch", running=0.02)
    assert layer.of("batch")(4).momentum == 0.02
    assert layer.of("none") is None
    assert norms_of(nn.Sequential(layer.of("rms")(4)))
    with pytest.raises(LabError, match="cannot be built: ValueError: there is no norm named 'rmss'"):
        check_arms(Source("text").load(SMALL["text"]), (parse_arm("layer+qk:rmss"),))


def test_what_makes_no_sense_is_refused_with_what_to_do():
    with pytest.raises(LabError, match="width 30 does not divide into 4 heads"):
        Source("digits-vit").load({"width": 30})
    with pytest.raises(LabError, match="9 x 9 patches of an image of 8 x 8 pixels; choose grid from 1 to 8"):
        Source("digits-vit").load({"grid": 9})


def trained(arm: str, steps: int = 8):
    """A small vision Transformer some steps from its start, with statistics that are not those of the start."""
    experiment, model = built("digits-vit", arm)
    data = seeded_data(experiment, 0)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for step in range(steps):
        x, y = data.train.take(torch.arange(20) + 20 * step)
        optimizer.zero_grad()
        experiment.loss(model(x), y).backward()
        optimizer.step()
    return model, data


@pytest.mark.parametrize("arm", ["progressive:4:2", pytest.param("batch+ffn:batch", marks=pytest.mark.slow)])
def test_norms_by_the_batch_fold_away_with_an_error_that_is_none(arm):
    model, data = trained(arm)
    without = folded._folded(model.eval(), data.validation.first(16)[0])
    x, _ = data.test.first(100)
    wanted = model(x)
    assert (without(x) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    kinds = {type(module) for module in without.modules()}
    assert not kinds & {nk.BatchNorm1d, RepBatchNorm, ProgressiveRepBatchNorm, nk.LayerNorm}
    assert isinstance(model.trunk.final, ProgressiveRepBatchNorm if arm.startswith("p") else nk.BatchNorm1d)


@pytest.mark.parametrize("arm", ["layer", "progressive:100"])
def test_what_cannot_be_folded_is_timed_as_it_is_and_nothing_else(arm):
    model, data = trained(arm, steps=1)
    found = folded.measure(model, data, 16)
    assert found["evaluation_ms"] > 0
    assert (found["folded_ms"], found["fold_error"]) == (None, None)


def test_the_statistics_of_the_test_are_asked_for_where_all_norms_are_batch_norms(tmp_path):
    text = Source("text").load(SMALL["text"])
    for arm, asked in (("batch+ffn:batch", True), ("layer+ffn:batch", False)):
        cell = Cell("text", parse_arm(arm), "adamw", 0.003, 0, "final", **FIELDS)
        status = train(cell, text, seeded_data(text, 0), tmp_path)
        assert status["state"] == "done"
        assert (status["test_exact"] is not None) == asked


RANGE = {"low": 0.001, "high": 0.01, "decades": 1.0, "rates": 3, "of": 9, "open_low": False, "open_high": False}


def arm(name: str, diverged: int = 0, searched: int = 0, high: float = 0.01, **extra):
    decades = {0.01: 1.0, 0.1: 2.0}[high]
    return {
        "name": name,
        "lr": 0.003,
        "bound_hit": None,
        "test": {"mean": 3.2, "low": 3.1, "high": 3.3, "n": 5},
        "runs": {"finished": 5, "diverged": diverged, "reached": 5 - diverged},
        "search": [
            {"lr": 0.003, "seeds": 2, "reached": 2, "diverged": 0},
            {"lr": 1.0, "seeds": 2, "reached": 0, "diverged": searched},
        ],
        "usable_rates": RANGE | {"high": high, "decades": decades},
        "stable_rates": RANGE,
        "ms_per_step": 8.0,
        **extra,
    }


def summary(*arms):
    about = {"name": "bits per character", "higher_is_better": False, "unit": "bits per character"}
    return {"experiment": {"metric": about, "sweep": None}, "points": [{"knob": None, "arms": list(arms)}]}


GAP = {"value": -0.1, "low": -0.2, "high": -0.05, "pairs": 5, "verdict": "better"}


def test_the_answers_say_what_the_record_says():
    found = {"evaluation_ms": 2.0, "folded_ms": 1.0, "times_as_fast": 2.0, "error": 3e-7}
    record = summary(
        arm("layer"), arm("layer+qk:rms", high=0.1), arm("batch", 2, 1), arm("progressive:50%:10%", folding=found)
    )
    answers = "\n".join(attention.answers(record, {"batch": {"progressive:50%:10%": GAP}}))
    assert "**Naive batch norm crashes** at its best rate: 2 of 5 final runs diverge" in answers
    assert "1 of 4 runs diverge and 2 of 4 reach the target, with layer norm 0 of 4 and 2 of 4." in answers
    assert "−0.100 [−0.200, −0.050] (better) against naive batch norm." in answers
    assert "`layer+qk:rms` the norm on queries and keys widens** the range of usable rates" in answers
    assert "2.0 times as fast, with an error of 3e-07" in answers
    calm = "\n".join(attention.answers(summary(arm("layer"), arm("layer+qk:rms"), arm("batch")), {}))
    assert "**Naive batch norm does not crash** at its best rate: 0 of 5" in calm
    assert "queries and keys does not change** the range" in calm
    rows = attention.rates(record).rows
    assert [row[0] for row in rows] == ["`layer`", "`layer+qk:rms`", "`batch`", "`progressive:50%:10%`"]
    assert attention.results(record, {}).rows[2][-4:] == ["3 of 5", "2 of 5", "2 of 4", "1 of 4"]
    assert attention.folding(record).rows[3] == ["`progressive:50%:10%`", "8.00", "2.00", "1.00 (2.0×)", "3e-07"]


def test_columns_about_folding_are_there_where_an_arm_has_them():
    plain, asked = summary(arm("layer")), summary(arm("layer"), arm("none", folding={"evaluation_ms": 2.0}))
    assert table.folding_columns(plain) == ()
    assert [c.cell(asked["points"][0]["arms"][1], {}) for c in table.folding_columns(asked)] == ["2.00", "–", "–"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rep", "RepBN"),
        ("progressive:50%:10%", "PRepBN (after 10 %, over 50 %)"),
        ("progressive:400", "PRepBN (over 400 batches)"),
        ("power:10%", "PowerNorm (warm-up 10 %)"),
        ("batch+ffn:batch", "batch norm, inside the feed-forward part too"),
        (
            "layer+ffn:batch+qk:rms",
            "layer norm and batch norm inside the feed-forward part with RMS norm on queries and keys",
        ),
    ],
)
def test_an_arm_of_a_transformer_has_words(name, words):
    assert label(name) == words
