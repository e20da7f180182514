"""A run: one child process per allocator, every record on disk as soon as it is there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from normkit.bench import memory
from normkit.bench.blocks import BLOCKS
from normkit.bench.cell import Record
from normkit.bench.plan import Plan, Task, case_of
from normkit.vocabulary.record import encode_line

SCHEMA = 1
FILE = "bench.jsonl"


def run(
    plan: Plan,
    directory: Path,
    environment: dict[str, Any],
    progress: Callable[[str, Task], None] = lambda allocator, task: None,
) -> list[Record]:
    """Carry out the plan and append every record to DIR/bench.jsonl, behind a line that says where it ran.

    Raises:
        RuntimeError: a child process could not even begin.
    """
    directory.mkdir(parents=True, exist_ok=True)
    records: list[Record] = [{"kind": "environment", "schema": SCHEMA, **environment}]
    with open(directory / FILE, "ab", buffering=0) as file:
        file.write(encode_line(records[0]))
        for allocator in plan.allocators:
            for record in _with(allocator, plan, progress):
                file.write(encode_line(record))
                records.append(record)
    return records


def _with(allocator: str, plan: Plan, progress: Callable[[str, Task], None]) -> Iterator[Record]:
    """All records of one allocator; a child that dies leaves a record of that, and the next one goes on behind it."""
    left = plan.tasks
    while left:
        reached = -1
        with tempfile.TemporaryFile() as said, _child(allocator, plan, left, said) as child:
            assert child.stdout is not None
            try:
                for line in child.stdout:
                    record = json.loads(line)
                    if "begin" in record:
                        reached = record["begin"]
                        progress(allocator, left[reached])
                    else:
                        yield record
            except BaseException:
                child.kill()
                raise
            status = child.wait()
            said.seek(0)
            last = said.read().decode(errors="replace").strip().splitlines()[-1:]
        if status == 0:
            return
        if reached < 0:
            raise RuntimeError(f"the measuring process ended before it began: {' '.join(last) or _ending(status)}")
        why = f"{_ending(status)}: {' '.join(last)}" if last else _ending(status)
        yield {**_name(left[reached]), "state": "failed", "why": why, "allocator": allocator, "threads": plan.threads}
        left = left[reached + 1 :]


def _child(allocator: str, plan: Plan, tasks: list[Task], said: Any) -> subprocess.Popen[bytes]:
    asked = {
        "tasks": tasks,
        "effort": asdict(plan.effort),
        "allocator": allocator,
        "threads": plan.threads,
        "device": plan.device,
    }
    threads = str(plan.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    child = subprocess.Popen(
        [sys.executable, "-m", "normkit.bench.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=said,
        env=environment,
    )
    assert child.stdin is not None
    child.stdin.write(json.dumps(asked).encode())
    child.stdin.close()
    return child


def _ending(status: int) -> str:
    return f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def _name(task: Task) -> Record:
    """What a record says about its task, for one that never came to say it."""
    if task["kind"] in ("model", "watch"):
        layout = {"layout": task["layout"]} if "layout" in task else {}
        return {"kind": task["kind"], "op": task["model"], "dtype": task["dtype"], **layout, "implementation": "torch"}
    if task["kind"] == "block":
        block = BLOCKS[task["block"]]
        return {"kind": "block", "op": block.name, "dtype": task["dtype"], "implementation": "normkit"}
    if task["kind"] == "memory":
        return {"kind": "memory", "op": memory.OP, "dtype": task["dtype"], "implementation": "torch"}
    case = case_of(task)
    return {
        "kind": "overhead" if task.get("overhead") else "synchronized" if "processes" in task else "op",
        "op": case.op,
        "shape": list(case.shape),
        "dtype": task["dtype"],
        "layout": task["layout"],
        "implementation": "torch",
    }
