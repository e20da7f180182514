"""Interleaved sampling: every round takes one sample of every peer; one that lost its processor is taken again.

One sample is an untimed call, so that a peer meets the caches and the allocator as it leaves them itself, and then the
timed one. The order changes from round to round, so that no peer always follows the same neighbour.
"""

from __future__ import annotations

import contextlib
import gc
import glob
import random
import resource
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

RETRIES = 2
"""How often a preempted sample is taken again within its round."""
LEAST_ROUNDS = 4
"""No time limit stops before this many."""
LONG, TOLERATED = 0.1, 0.01
"""Seconds from which on a sample may lose its processor, and the share of it that its threads may wait: no second is
without a moment of the kernel's own."""


@dataclass(frozen=True)
class Step:
    """What is timed: ``forward()`` gives something, ``finish`` (the backward pass) takes it."""

    forward: Callable[[], Any]
    finish: Callable[[Any], Any]


@dataclass(frozen=True)
class Sample:
    """Seconds per call of the forward part and of the whole, and what else happened meanwhile."""

    forward: float
    whole: float
    preempted: bool
    """It lost its processor; a long one: for more than ``TOLERATED`` of its time."""
    faults: float
    """Page faults per call."""


Round = dict[str, Sample]


def take(step: Step, repeats: int = 1, settle: Callable[[], None] = lambda: None) -> Sample:
    """One sample: ``repeats`` timed calls behind an untimed one. ``settle`` waits for a device."""
    step.finish(step.forward())
    settle()
    forward = whole = 0.0
    before, waited = resource.getrusage(resource.RUSAGE_SELF), seconds_waited()
    for _ in range(repeats):
        start = time.perf_counter()
        result = step.forward()
        settle()
        middle = time.perf_counter()
        gradients = step.finish(result)
        settle()
        end = time.perf_counter()
        forward += middle - start
        whole += end - start
        del result, gradients
    after = resource.getrusage(resource.RUSAGE_SELF)
    preempted = after.ru_nivcsw > before.ru_nivcsw
    if preempted and waited is not None and whole > LONG:
        preempted = (seconds_waited() or 0.0) - waited > TOLERATED * whole
    return Sample(
        forward / repeats,
        whole / repeats,
        preempted,
        (after.ru_minflt - before.ru_minflt) / repeats,
    )


def seconds_waited() -> float | None:
    """How long all threads of this process have waited for a processor that was taken; ``None`` where nobody counts."""
    waits = []
    for file in glob.glob("/proc/self/task/*/schedstat"):
        with contextlib.suppress(OSError), open(file, encoding="ascii") as counters:  # a thread may end meanwhile
            waits.append(int(counters.read().split()[1]))
    return sum(waits) / 1e9 if waits else None


def interleave(
    names: Iterable[str],
    sample: Callable[[str], Sample],
    *,
    rounds: int,
    seconds: float,
    now: Callable[[], float] = time.perf_counter,
) -> list[Round]:
    """Rounds of one sample per name, in an order that differs each time.

    Stops after ``rounds`` rounds without a preempted sample, after twice as many in all, or when the time is up (but
    not before ``LEAST_ROUNDS``).
    """
    order, shuffled = list(names), random.Random(0)
    done: list[Round] = []
    begin = now()
    with _no_collection():
        while len(undisturbed(done)) < rounds and len(done) < 2 * rounds:
            if len(done) >= LEAST_ROUNDS and now() - begin > seconds:
                break
            shuffled.shuffle(order)
            done.append({name: _patiently(name, sample) for name in order})
    return done


def undisturbed(rounds: Iterable[Mapping[str, Sample]]) -> list[Mapping[str, Sample]]:
    """The rounds in which nobody was preempted: the ones that count."""
    return [one for one in rounds if not any(sample.preempted for sample in one.values())]


def _patiently(name: str, sample: Callable[[str], Sample]) -> Sample:
    taken = sample(name)
    for _ in range(RETRIES):
        if not taken.preempted:
            break
        taken = sample(name)
    return taken


@contextlib.contextmanager
def _no_collection() -> Any:
    """The garbage collector at rest: it would strike one peer and not the other."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
