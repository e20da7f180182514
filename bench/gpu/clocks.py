"""Two clocks of one shape: a GPU's events with the cache flushed, and a stand-in for rehearsals on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from normkit.bench.clock import Step

FLUSH_BYTES = 256 * 2**20
"""More than any second-level cache holds."""
SAMPLES, CALLS = 20, 30
HEAD_START = 3_000_000
"""Cycles that the device sleeps before a sample, about 1.6 ms: the host has then launched all of it, and what is timed
is the device and no gap between two launches. What calls cost is in ``wall``."""


class DeviceClock:
    """Milliseconds by device events; the second-level cache is flushed before every sample."""

    device = "cuda"

    def __init__(self) -> None:
        self._flush = torch.zeros(FLUSH_BYTES // 8, dtype=torch.int64, device=self.device)

    def flush(self) -> None:
        """Fill the second-level cache with what nobody wants; by reading, because what was written would still have to
        go to memory while the first kernel runs."""
        self._flush.sum()

    def events(self, step: Step) -> dict[str, float]:
        """``forward`` and ``step`` (forward and backward), medians."""
        self._warm(step)
        samples = []
        for _ in range(SAMPLES):
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
            self.flush()
            torch.cuda._sleep(HEAD_START)
            marks[0].record()
            y = step.forward()
            marks[1].record()
            step.finish(y)
            marks[2].record()
            samples.append(marks)
        torch.cuda.synchronize()
        forward = statistics.median(a.elapsed_time(b) for a, b, _ in samples)
        return {"forward_ms": forward, "step_ms": statistics.median(a.elapsed_time(c) for a, _, c in samples)}

    def wall(self, step: Step) -> float:
        """Milliseconds per forward and backward as a training loop meets them: nothing is waited for in between."""
        self._warm(step)
        begin = time.perf_counter()
        for _ in range(CALLS):
            step.finish(step.forward())
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - begin) / CALLS

    def graph(self, step: Step) -> float:
        """Milliseconds of forward and backward out of a CUDA graph: no cost of calls is in it."""
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            self._warm(step)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step.finish(step.forward())
        samples = []
        for _ in range(SAMPLES):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush()
            begin.record()
            graph.replay()
            end.record()
            samples.append((begin, end))
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in samples)

    def peak(self, step: Step) -> float:
        """Megabytes that forward and backward need beside what is there before."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step.finish(step.forward())
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    def copy_bandwidth(self) -> float:
        """Bytes per second, read and written, of a copy of half a gigabyte."""
        source = torch.empty(2**29, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        found = self.events(Step(lambda: target.copy_(source), lambda y: None))
        return 2 * source.numel() / (found["forward_ms"] / 1e3)

    def _warm(self, step: Step) -> None:
        for _ in range(3):
            step.finish(step.forward())


class Rehearsal:
    """The same answers on a CPU, from one call each: they time Triton's interpreter and mean nothing."""

    device = "cpu"

    def events(self, step: Step) -> dict[str, float]:
        begin = time.perf_counter()
        y = step.forward()
        middle = time.perf_counter()
        step.finish(y)
        end = time.perf_counter()
        return {"forward_ms": 1e3 * (middle - begin), "step_ms": 1e3 * (end - begin)}

    def wall(self, step: Step) -> float:
        return self.events(step)["step_ms"]

    def graph(self, step: Step) -> None:
        """A CPU has none."""

    def peak(self, step: Step) -> None:
        """torch does not count there."""

    def copy_bandwidth(self) -> float:
        source = torch.empty(2**20, dtype=torch.uint8)
        return 2 * source.numel() / (self.events(Step(source.clone, lambda y: None))["forward_ms"] / 1e3)


def measured(clock: Any, step: Step, *, graph: bool = True) -> dict[str, Any]:
    """All that a record says about one step; a graph that cannot be captured is said, not raised."""
    events = clock.events(step)
    backward = {"backward_ms": max(events["step_ms"] - events["forward_ms"], 1e-6)}
    told: dict[str, Any] = {**events, **backward, "wall_ms": clock.wall(step), "peak_mb": clock.peak(step)}
    capture: Callable[[], Any] = lambda: clock.graph(step)
    try:
        told["graph_ms"] = capture() if graph else None
    except Exception as error:
        told["graph_ms"], told["graph_why"] = None, f"{type(error).__name__}: {str(error)[:200]}"
    return told
