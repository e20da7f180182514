"""The child process of a run: takes tasks from standard input, answers with one JSON line per record.

A process of its own per allocator, because a pinned allocator cannot be let go again, and because a kernel that crashes
should cost one record and not the run.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from typing import IO, Any

import torch

from normkit.bench import blocks, memory, synchronized, training, watched
from normkit.bench.allocator import pin
from normkit.bench.cell import Effort, Record, measure
from normkit.bench.plan import case_of
from normkit.vocabulary.record import encode_line

OFTEN = 4
"""Times as many rounds for what a call costs: a few percent of a tenth of a millisecond are asked for."""


def main() -> None:
    """Read ``{"tasks", "effort", "allocator", "threads", "device"}`` and work."""
    answers = _answers()
    asked = json.load(sys.stdin)
    torch.set_num_threads(asked["threads"])
    if asked["allocator"] == "pinned" and not pin():
        raise SystemExit("this C library has no mallopt: only --allocator default can be measured here")
    effort = Effort(**{**asked["effort"], "wanted": tuple(asked["effort"]["wanted"])})
    for number, task in enumerate(asked["tasks"]):
        _tell(answers, {"begin": number})
        for record in carry_out(task, effort, asked["device"]):
            _tell(answers, {**record, "allocator": asked["allocator"], "threads": asked["threads"]})


def carry_out(task: dict[str, Any], effort: Effort, device: str) -> list[Record]:
    """The records of one task."""
    if task["kind"] == "model":
        return training.measure(task["model"], task["dtype"], task["layout"], effort, device)
    if task["kind"] == "watch":
        return watched.measure(task["model"], task["dtype"], effort, device)
    if task["kind"] == "block":
        return blocks.measure(task["block"], effort, device)
    if task["kind"] == "memory":
        return memory.measure(task["dtype"], effort, device)
    if "processes" in task:
        return synchronized.measure(case_of(task), task["dtype"], task["processes"], effort)
    if task.get("overhead"):
        often = replace(effort, rounds=OFTEN * effort.rounds)
        records = measure(case_of(task), task["dtype"], task["layout"], often, device)
        return [{**record, "kind": "overhead"} for record in records]
    return measure(case_of(task), task["dtype"], task["layout"], effort, device)


def _answers() -> IO[bytes]:
    """The original standard output; whatever else prints goes to standard error from here on."""
    own = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    return own


def _tell(answers: IO[bytes], line: dict[str, Any]) -> None:
    answers.write(encode_line(line))


if __name__ == "__main__":
    main()
