"""One cell: a case in one type and layout. Every peer becomes one record: measured, refused or skipped, and why."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from normkit.bench import parity
from normkit.bench.allocator import available_bytes, peak_megabytes
from normkit.bench.cases import Case
from normkit.bench.clock import LEAST_ROUNDS, Round, Sample, Step, interleave, take, undisturbed
from normkit.bench.inputs import Inputs, inputs, weight_dtype
from normkit.bench.peers import BASELINE, Peer, peers
from normkit.bench.spread import paired_difference, paired_ratio, quartiles

Record = dict[str, Any]
COPY = "copy"
"""The yardstick: as many bytes as one tensor read and written, which is two memory passes."""
LEAST_SAMPLE = 1e-3
"""Seconds: a shorter step is repeated within one sample until it takes this long."""
TENSORS_ALIVE, EXACT_ALIVE = 10, 4
"""What a cell needs at once: inputs, gradients and intermediates of its own type, and the oracle's in float64."""


@dataclass(frozen=True)
class Effort:
    """How long to sample one cell."""

    rounds: int = 15
    seconds: float = 20.0
    wanted: tuple[str, ...] = ()
    """Implementations by name; empty: all."""


def measure(case: Case, dtype: str, layout: str, effort: Effort, device: str = "cpu") -> list[Record]:
    """All records of one cell, the yardstick's last."""
    about = _about(case, dtype, layout, device)
    if (reason := _too_large(case, dtype, device)) is not None:
        return [{**about, "implementation": BASELINE, "state": "skipped", "why": reason}]
    given = inputs(case, dtype, layout, device)
    weights = getattr(torch, weight_dtype(case, dtype))
    right = parity.truth(case, given, weights)
    records: list[Record] = []
    torchs: dict[str, parity.Agreement] | None = None
    right_peers: list[Peer] = []
    for peer in peers(case, weights, given, effort.wanted):
        if isinstance(peer, tuple):
            records.append({**about, "implementation": peer[0], "state": "skipped", "why": peer[1]})
            continue
        record = {**about, "implementation": peer.name, "backend": peer.backend}
        try:
            agreements = parity.check(peer, given, right)
        except Exception as error:  # the other peers are still worth their numbers
            state = "skipped" if peer.name == "torch.compile" else "failed"  # there may be no C++ compiler here
            records.append({**record, "state": state, "why": _first_lines(error)})
            continue
        record["parity"] = parity.to_json(agreements)
        wrong = parity.objection(agreements, torchs)
        if peer.name == BASELINE:  # what people have is timed with its errors, and they are told
            torchs = agreements
            record |= {"remark": f"torch's own error: {wrong}"} if wrong else {}
        elif wrong is not None:
            records.append({**record, "state": "refused", "why": f"parity is red, so it is not timed: {wrong}"})
            continue
        records.append({**record, "state": "measured"})
        right_peers.append(peer)
    del right
    steps = {peer.name: peer.step(given) for peer in right_peers} | {COPY: _copy(given)}
    for name, numbers in time_steps(steps, effort, device).items():
        found = next((r for r in records if r["implementation"] == name), None)
        if found is None:
            records.append({**about, "implementation": COPY, "state": "measured", **numbers})
        else:
            found.update(numbers)
    torch.compiler.reset()
    return records


def time_steps(steps: dict[str, Step], effort: Effort, device: str = "cpu") -> dict[str, Record]:
    """The numbers of every step, sampled in turns; ratios are against ``torch``, where it is among them."""
    settle = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)
    found: dict[str, Record] = {}
    repeats: dict[str, int] = {}
    with _no_recompilation():
        for name, step in steps.items():
            try:
                repeats[name] = _repeats(step, settle)
            except Exception as error:  # a compiled peer whose warm-up was none: the others can still be timed
                found[name] = {"state": "skipped", "why": _first_lines(error)}
        rounds = interleave(
            repeats, lambda name: take(steps[name], repeats[name], settle), rounds=effort.rounds, seconds=effort.seconds
        )
        found |= {name: numbers(name, rounds) for name in repeats}
        if device == "cpu":
            for name, step in steps.items():
                if name != COPY and name in repeats:
                    found[name]["peak_mb"] = peak_megabytes(lambda step=step: step.finish(step.forward()))  # type: ignore[misc]
    return found


def numbers(name: str, rounds: list[Round]) -> Record:
    """What one peer's samples say.

    Rounds with a preempted sample are dropped. Where that leaves fewer than four, the machine was busy: all rounds are
    used, and ``quiet`` is false.
    """
    clean = undisturbed(rounds)
    quiet = len(clean) >= LEAST_ROUNDS
    kept = clean if quiet else rounds
    record: Record = {
        "rounds": len(kept),
        "preempted": len(rounds) - len(clean),
        "quiet": quiet,
        "faults": quartiles([one[name].faults for one in kept])[1],
    }
    for part, seconds in PARTS.items():
        if name == COPY and part == "step":
            continue
        own = [seconds(one[name]) for one in kept]
        low, middle, high = quartiles(own)
        told: Record = {"ms": 1e3 * middle, "low_ms": 1e3 * low, "high_ms": 1e3 * high}
        if COPY in kept[0] and name != COPY:
            passes = [2 * seconds(one[name]) / one[COPY].forward for one in kept]
            told["passes"] = quartiles(passes)[1]
        if BASELINE in kept[0] and name not in (COPY, BASELINE):
            baseline = [seconds(one[BASELINE]) for one in kept]
            told["speedup"] = paired_ratio(baseline, own)
            told["extra_us"] = paired_difference([1e6 * value for value in baseline], [1e6 * value for value in own])
        told["samples_ms"] = [round(1e3 * value, 6) for value in own]
        record[part] = told
    return record


PARTS: dict[str, Callable[[Sample], float]] = {
    "forward": lambda sample: sample.forward,
    "step": lambda sample: sample.whole,
}
"""``step`` is forward and backward together."""


def _about(case: Case, dtype: str, layout: str, device: str) -> Record:
    forward, step = case.floor()
    return {
        "kind": "op",
        "op": case.op,
        "shape": list(case.shape),
        "dtype": dtype,
        "layout": layout,
        "device": device,
        "weight_dtype": weight_dtype(case, dtype),
        "tensor_mb": case.size(dtype) / 1e6,
        "floor_passes": {"forward": forward, "step": step},
        "reason": case.reason,
    }


def _copy(given: Inputs) -> Step:
    source = given.x.detach()
    target = torch.empty_like(source)
    return Step(lambda: target.copy_(source), lambda y: None)


def _repeats(step: Step, settle: Callable[[], None]) -> int:
    """How many calls fill one sample: a clock read around a few microseconds would measure itself."""
    step.finish(step.forward())
    settle()
    start = time.perf_counter()
    step.finish(step.forward())
    settle()
    return max(1, round(LEAST_SAMPLE / (time.perf_counter() - start)))


@contextlib.contextmanager
def _no_recompilation() -> Iterator[None]:
    """A compiled peer that compiles again while it is timed raises: its warm-up was none."""
    with torch.compiler.set_stance("fail_on_recompile"):
        yield


def _too_large(case: Case, dtype: str, device: str) -> str | None:
    available = available_bytes() if device == "cpu" else None
    needed = TENSORS_ALIVE * case.size(dtype) + EXACT_ALIVE * case.size("float64")
    if available is None or needed < available:
        return None
    return f"needs about {needed / 1e9:.0f} GB, and {available / 1e9:.0f} GB are free"


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:300]}"
