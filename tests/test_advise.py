"""nk.advise: what it says follows from the digest, and the digest from the committed records."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

import normkit as nk
from normkit.lab.analyse.small_batches import digest
from normkit.report import small_batches

ROOT = Path(__file__).parent.parent
ARMS = ("none", "batch", "batch:renorm:3:5:50+running:0.02")
CUT = ("batch", "batch:ghost:4", "batch:synchronized+processes:2")


def summary(arms: dict[str, dict[int, list[float]]], exact: float = 0.0) -> dict:
    """A sweep whose final runs have these test accuracies by arm and batch size, and `exact` more without the lag."""
    sizes = sorted(next(iter(arms.values())))
    interval = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 3}
    gap = {"value": exact, "low": exact - 0.01, "high": exact + 0.01, "pairs": 3, "verdict": "better"}

    def point(name: str) -> dict:
        batch = name.startswith("batch")
        return {
            "name": name,
            "lr": 0.1,
            "runs": {"reached": 1, "finished": 3},
            "steps_to_target": {"median": 7},
            "test": interval,
            "test_exact": interval | {"difference": gap} if batch and exact else None,
            "test_batch": None,
            "cpu_ms_per_step": 1.23456789,
            "peak_memory_mb": 400.0,
        }

    def about(name: str) -> dict:
        more = {"running": 0.02} if "running" in name else {"processes": 2} if "processes" in name else {}
        return {"name": name, "norm": name.split("+")[0], **more}

    experiment = {
        "arms": [about(name) for name in arms],
        "command": "normkit compare digits-cnn --sweep ...",
        "title": "a network",
        "seeds": [0, 1, 2],
        "steps": 64,
        "batch_size": 50,
        "target": 0.9,
        "metric": {"higher_is_better": True},
        "environment": {"processor": "a processor", "torch": "2"},
    }
    runs = [
        {"arm": name, "knob": size, "phase": "final", "seed": seed, "state": "done", "test": test}
        for name, by_size in arms.items()
        for size, tests in by_size.items()
        for seed, test in enumerate(tests)
    ]
    return {
        "experiment": experiment,
        "points": [{"knob": s, "arms": [point(n) for n in arms]} for s in sizes],
        "runs": runs,
    }


def made(monkeypatch, **options) -> dict:
    """nk.advise answering from two sweeps that this test made up."""
    none, batch, renorm, ghost, together = (
        {4: [0.2, 0.3, 0.25], 64: [0.1, 0.1, 0.1]},
        {4: [0.6, 0.7, 0.65], 64: [0.9, 0.9, 0.95]},
        {4: [0.7, 0.79, 0.76], 64: [0.91, 0.88, 0.96]},
        {4: [0.6, 0.7, 0.65], 64: [0.7, 0.71, 0.74]},
        {4: [0.61, 0.69, 0.65], 64: [0.9, 0.91, 0.94]},
    )
    records = {
        "records/compare/one": summary(dict(zip(ARMS, (none, batch, renorm), strict=True)), **options),
        "records/compare/two": summary(dict(zip(CUT, (batch, ghost, together), strict=True))),
    }
    found = json.loads(json.dumps(digest(records, values_per_sample=64)))
    monkeypatch.setattr(importlib.import_module("normkit.advise"), "_digest", lambda: found)
    return found


def whats(items) -> list[str]:
    return [item if isinstance(item, str) else item.what for item in items]


def test_what_is_better_is_advised_with_its_interval_and_record(monkeypatch):
    made(monkeypatch)
    advice = nk.advise(batch_per_rank=4)
    (use,) = advice.use
    assert use.what == "batch renorm (3, 5, 50) instead of batch norm"
    assert use.points == pytest.approx(10.0, abs=1e-3)  # (10 + 9 + 11) / 3
    assert 9 <= use.low < 10 < use.high <= 11
    assert use.record == "records/compare/one"
    assert use.how == 'nk.create("batch:renorm:3:5:50", channels, momentum=0.02)'
    assert whats(advice.avoid) == ["no normalization instead of batch norm"]
    assert advice.question == "Batches of 4 samples in one process."
    assert "records/compare/one: a network, 3200 samples seen, 3 paired seeds, 95 % intervals" in advice.evidence[0]
    assert "use  batch renorm (3, 5, 50) instead of batch norm: +10.0 points [" in str(advice)


def test_where_nothing_is_better_it_says_plain_batch_norm(monkeypatch):
    made(monkeypatch)
    advice = nk.advise(batch_per_rank=64)
    assert advice.use == ("plain batch norm: nothing that was tried is better at 64",)
    assert whats(advice.undecided) == ["batch renorm (3, 5, 50) instead of batch norm"]


def test_recomputed_statistics_are_advised_where_they_help(monkeypatch):
    made(monkeypatch, exact=0.05)
    use = nk.advise(batch_per_rank=64).use
    assert [(one.what, one.points, one.how) for one in use] == [
        ("batch norm with statistics recomputed before evaluating", 5.0, "nk.calibrate_(model, loader)")
    ]


def test_several_processes_are_told_what_synchronising_gives_back(monkeypatch):
    made(monkeypatch)
    advice = nk.advise(batch_per_rank=4, world_size=16)
    gain = next(item for item in advice.use if not isinstance(item, str) and item.how == "nk.sync_(model)")
    assert "64 samples are one batch and not parts of 4" in gain.what
    assert gain.points == pytest.approx(20.0, abs=1e-3)  # the loss of the parts, turned round
    assert gain.low <= gain.points <= gain.high
    assert any("synchronised batch norm over 2 processes" in item.what for item in advice.undecided)
    assert len(advice.evidence) == 2
    assert not any("parts of 4" in text for text in whats(nk.advise(batch_per_rank=32, world_size=2).use))


def test_what_was_not_measured_is_said(monkeypatch):
    made(monkeypatch)
    far = nk.advise(batch_per_rank=1000, world_size=2)
    assert "a batch of 1000 samples: measured were 4 to 64" in far.unknown
    assert "all processes together of 2000 samples: measured were 4 to 64" in far.unknown
    between = nk.advise(batch_per_rank=5)
    assert "a batch of 5 itself: the nearest size measured is 4" in between.unknown
    assert between.use == nk.advise(batch_per_rank=4).use
    few = nk.advise(batch_per_rank=4, values_per_channel=4)
    assert any(
        text.startswith("1 values per channel and sample: the network of the records has 64") for text in few.unknown
    )
    like = nk.advise(batch_per_rank=4, values_per_channel=4 * 49)
    assert not any("values per channel" in text for text in like.unknown)
    assert like.unknown[-1].startswith("other networks, data and longer training")


def test_one_value_per_channel_leaves_no_batch_norm():
    advice = nk.advise(batch_per_rank=1, values_per_channel=1)
    assert "one value per channel has no deviation" in str(advice)
    assert not any("batch norm" in text for text in whats(advice.use))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"batch_per_rank": 0}, "batch_per_rank=0 counts something"),
        ({"batch_per_rank": 2.0}, r"batch_per_rank=2\.0 counts something"),
        ({"batch_per_rank": True}, "batch_per_rank=True counts something"),
        ({"batch_per_rank": "8"}, "batch_per_rank='8' counts something"),
        ({"batch_per_rank": 8, "world_size": -1}, "world_size=-1 counts something"),
        ({"batch_per_rank": 8, "values_per_channel": 0}, "values_per_channel=0 counts something"),
        ({"batch_per_rank": 8, "values_per_channel": 7}, "every sample has at least one value"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(asked, words):
    with pytest.raises(ValueError, match=words):
        nk.advise(**asked)


def test_an_arm_whose_runs_all_diverged_is_no_reason_to_fall_over(monkeypatch):
    found = made(monkeypatch)
    nothing = {"value": None, "low": None, "high": None, "pairs": 0, "verdict": "no pairs"}
    for size in found["sizes"]:
        for arm in size["arms"].values():
            arm["against_plain"] = arm["against_plain"] and nothing
    advice = nk.advise(batch_per_rank=4, world_size=2)
    assert advice.use == ("plain batch norm: nothing that was tried is better at 4",)


def test_the_tables_say_what_the_digest_says(monkeypatch):
    found = made(monkeypatch, exact=0.05)
    table = small_batches.accuracy(found, "records/compare/one")
    assert table.header == ["batch size", "batch norm", "no normalization", "batch renorm (3, 5, 50)"]
    assert [row[0] for row in table.rows] == ["4", "64"]
    assert table.rows[0][3].startswith("+10.0 points [+9.")
    small, large = small_batches.sentences(found, "records/compare/one")
    assert small.startswith(
        "**4**: better than batch norm with running statistics: batch renorm (3, 5, 50) (+10.0 points"
    )
    assert "batch norm with exact statistics (+5.0 points [+4.0, +6.0]); worse: no normalization (" in small
    assert "not distinguishable: batch renorm" in large
    exact = small_batches.at_test(found, "records/compare/one")
    assert exact.header[1:3] == ["batch norm: exact", "batch norm: test batch"]
    assert exact.rows[0][1:3] == ["+5.0 points [+4.0, +6.0]", "–"]
    assert small_batches.cost(found, "records/compare/two").rows[0][1] == "1.23 ms, 400 MB"
    assert small_batches.race(found, "records/compare/two").rows[0][1] == "7 (1 of 3), rate 0.1"
