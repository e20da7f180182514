"""Runs a comparison again and again and kills it with signal 9 at random moments, until it gets to its end.

`python kills.py DIRECTORY SEED MOST_KILLS` in a process of its own: it imports once and forks for every attempt, which
is safe because nothing has started a thread yet. Prints how often it killed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from normkit.lab import Experiment, comparison
from small_experiments import tiny


def slow() -> Experiment:
    """Long enough for a kill to meet it in the middle; dropout, momentum and buffers all have to be resumed."""
    return replace(tiny(steps=220, target=2.0), arms=("batch+dropout:0.5+momentum",))


def run(directory: Path) -> None:
    comparison.conclude = lambda directory: directory
    comparison.compare(slow, budget="quick", out=directory, parallel=1, seeds=2, checkpoint_seconds=0)


def attempt(directory: Path, seconds: float | None) -> bool:
    """One attempt in a fork, killed after some seconds; True when it came to its end before."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run(directory)
            status = 0
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"the attempt ended with status {os.WEXITSTATUS(status)}")
    return os.WIFEXITED(status)


def main(directory: Path, seed: int, most: int) -> int:
    torch.set_num_threads(1)
    moments = random.Random(seed)
    for kills in range(most):
        if attempt(directory, moments.uniform(0.05, 0.5)):
            return kills
    attempt(directory, None)
    return most


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
