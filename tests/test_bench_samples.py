"""Sampling in turns, and what the samples say. Nothing here asserts a time."""

from __future__ import annotations

import gc
import math
import mmap
import random
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest

from normkit.bench import clock
from normkit.bench.cell import COPY, numbers
from normkit.bench.clock import LEAST_ROUNDS, Sample, Step, interleave, take, undisturbed
from normkit.bench.spread import geometric_mean, paired_difference, paired_ratio, quartiles


def test_quartiles_of_known_numbers():
    assert quartiles([5, 1, 3, 2, 4]) == (2, 3, 4)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_a_paired_ratio_ignores_what_slows_both_peers_of_a_round():
    generator = random.Random(0)
    other = [generator.uniform(1, 3) for _ in range(15)]
    slow = [generator.choice([1, 1, 8]) for _ in other]
    ratio = paired_ratio(
        [2 * o * s for o, s in zip(other, slow, strict=True)], [o * s for o, s in zip(other, slow, strict=True)]
    )
    assert [ratio[key] for key in ("value", "low", "high")] == pytest.approx([2, 2, 2], rel=1e-12)


def test_a_paired_ratio_and_its_inverse_agree():
    generator = random.Random(1)
    a, b = ([generator.lognormvariate(0, 0.5) for _ in range(9)] for _ in range(2))
    there, back = paired_ratio(a, b), paired_ratio(b, a)
    assert there["value"] * back["value"] == pytest.approx(1, rel=1e-12)
    assert there["low"] < there["value"] < there["high"]
    assert there["value"] == pytest.approx(statistics.median(x / y for x, y in zip(a, b, strict=True)), rel=1e-12)
    assert paired_ratio(a, b) == there  # the same samples, the same interval


@pytest.mark.parametrize(("rounds", "ends"), [(0, False), (1, False), (3, False), (4, True)])
def test_few_rounds_give_no_interval(rounds, ends):
    ratio = paired_ratio([2.0] * rounds, [1.0] * rounds)
    assert (ratio["value"] is not None) == (rounds > 0)
    assert (ratio["low"] is not None) == ends
    assert ratio["rounds"] == rounds


def test_paired_difference_and_geometric_mean():
    assert paired_difference([1.0, 10.0, 100.0], [3.0, 13.0, 104.0])["value"] == 3.0
    assert geometric_mean([0.5, 8.0]) == pytest.approx(2.0)


def sample(whole: float = 1.0, *, preempted: bool = False, forward: float | None = None, faults: float = 0.0) -> Sample:
    return Sample(whole / 2 if forward is None else forward, whole, preempted, faults)


def test_every_round_samples_every_peer_once_in_an_order_that_changes():
    seen: list[str] = []

    def one(name: str) -> Sample:
        seen.append(name)
        return sample()

    rounds = interleave("abcd", one, rounds=12, seconds=math.inf)
    orders = [tuple(seen[at : at + 4]) for at in range(0, len(seen), 4)]
    assert len(rounds) == len(orders) == 12
    assert all(sorted(order) == list("abcd") for order in orders)
    assert len(set(orders)) > 6
    assert {order[0] for order in orders} == set("abcd")


def test_a_preempted_sample_is_taken_again_and_no_other():
    calls = {"quiet": 0, "once": 0, "always": 0}

    def one(name: str) -> Sample:
        calls[name] += 1
        return sample(preempted=name == "always" or (name == "once" and calls[name] % 2 == 1))

    rounds = interleave(calls, one, rounds=5, seconds=math.inf)
    assert len(rounds) == 10  # twice as many as asked for, and then it gives up
    assert calls == {"quiet": 10, "once": 20, "always": 10 * (1 + clock.RETRIES)}
    assert undisturbed(rounds) == []
    assert not rounds[0]["once"].preempted


def test_the_time_limit_leaves_the_least_number_of_rounds():
    ticks = iter(range(1000))
    rounds = interleave("ab", lambda name: sample(), rounds=50, seconds=0.5, now=lambda: next(ticks))
    assert len(rounds) == LEAST_ROUNDS


def test_the_garbage_collector_rests_while_samples_are_taken():
    states = []
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        interleave("a", lambda name: states.append(gc.isenabled()) or 1 / 0, rounds=1, seconds=1)
    assert states == [False]
    assert gc.isenabled()


def test_a_sample_calls_once_untimed_and_counts_the_faults_of_the_rest():
    pages, calls, finished = 300, [], []

    def touch() -> mmap.mmap:
        memory = mmap.mmap(-1, pages * mmap.PAGESIZE)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        for page in range(pages):
            memory[page * mmap.PAGESIZE] = 1
        calls.append(memory)
        return memory

    taken = take(Step(touch, finished.append), repeats=3)
    assert len(calls) == 4
    assert finished == calls
    assert pages <= taken.faults < 1.5 * pages
    assert 0 < taken.forward <= taken.whole


@pytest.mark.parametrize(
    ("switches", "seconds", "waited", "preempted"),
    [
        ((7, 7), 0.01, (0.0, 0.0), False),
        ((7, 8), 0.01, (0.0, 0.0), True),
        ((7, 8), 0.01, (None, None), True),
        ((7, 90), 2.0, (5.0, 5.019), False),  # a moment
        ((7, 8), 2.0, (5.0, 5.021), True),
        ((7, 8), 2.0, (None, None), True),  # nobody counts
    ],
)
def test_a_sample_that_lost_its_processor_says_so(monkeypatch, switches, seconds, waited, preempted):
    usage = iter(SimpleNamespace(ru_nivcsw=count, ru_minflt=0) for count in switches)
    times, waits = iter((0.0, seconds / 2, seconds)), iter(waited)
    monkeypatch.setattr(clock.resource, "getrusage", lambda who: next(usage))
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    monkeypatch.setattr(clock, "seconds_waited", lambda: next(waits))
    assert take(Step(lambda: None, lambda result: None)).preempted == preempted


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this kernel does not count waits")
def test_waiting_for_a_processor_is_counted():
    before = clock.seconds_waited()
    assert before is not None
    assert clock.seconds_waited() >= before >= 0


def test_rounds_with_a_preempted_sample_are_dropped():
    rounds = [{"torch": sample(2.0), "normkit": sample(1.0), COPY: sample(0.25, forward=0.25)} for _ in range(4)]
    rounds += [{"torch": sample(99.0, preempted=True), "normkit": sample(1.0), COPY: sample(9.0)} for _ in range(5)]
    told = numbers("normkit", rounds)
    assert (told["rounds"], told["preempted"], told["quiet"]) == (4, 5, True)
    assert told["step"]["speedup"] == {"value": 2.0, "low": 2.0, "high": 2.0, "rounds": 4}
    assert told["step"]["extra_us"]["value"] == -1e6
    assert told["step"]["ms"] == 1000
    assert told["step"]["passes"] == 8  # a pass is half a copy
    assert told["step"]["samples_ms"] == [1000.0] * 4
    assert "speedup" not in numbers("torch", rounds)["step"]
    assert "step" not in numbers(COPY, rounds)


def test_where_too_few_rounds_are_quiet_all_are_used_and_marked():
    rounds = [{"torch": sample(float(n), preempted=n > 2)} for n in range(1, 8)]
    told = numbers("torch", rounds)
    assert (told["rounds"], told["preempted"], told["quiet"]) == (7, 5, False)
    assert told["step"]["ms"] == 4000
