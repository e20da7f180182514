"""Cell: one training run of one arm at one learning rate with one seed, and the directory that is named after it."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from typing import Any

from normkit.lab.arm import Arm
from normkit.lab.knob import ARM_KNOBS
from normkit.lab.shares import in_steps
from normkit.vocabulary.record import encode

SEARCH, FINAL = "search", "final"


@dataclass(frozen=True)
class Cell:
    """Everything that decides the result of one run."""

    task: str
    arm: Arm
    optimizer: str  # of the task, for an arm that names none
    lr: float
    seed: int
    phase: str
    steps: int
    eval_every: int
    batch_size: int
    target: float
    threads: int
    data: str  # fingerprint
    code: str  # fingerprint
    options: dict[str, Any] = field(default_factory=dict)
    knob: dict[str, Any] | None = None

    @property
    def trained_arm(self) -> Arm:
        """The arm at this cell's value of the swept knob, shares of the run counted in its steps.

        `arm` is the arm as the experiment names it.
        """
        arm = self.arm
        if self.knob and self.knob["name"] in ARM_KNOBS:
            arm = arm.with_knob(self.knob["name"], self.knob["value"])
        choices = tuple((key, in_steps(value, self.steps)) for key, value in arm.choices)
        return replace(arm, norm=in_steps(arm.norm, self.steps), choices=choices)

    def config(self) -> dict[str, Any]:
        """config.json of the cell."""
        content = {
            "task": self.task,
            "options": self.options,
            "arm": self.arm.record(self.optimizer),
            "lr": self.lr,
            "seed": self.seed,
            "phase": self.phase,
            "knob": self.knob,
            "steps": self.steps,
            "eval_every": self.eval_every,
            "batch_size": self.batch_size,
            "target": self.target,
            "threads": self.threads,
            "data": self.data,
            "code": self.code,
        }
        return content | {"hash": short_hash(content)}

    @property
    def name(self) -> str:
        """The directory below cells/, readable and unique: arm, knob, rate, seed, hash."""
        knob = [f"{self.knob['name']}-{self.knob['value']}"] if self.knob else []
        words = [self.arm.name, *knob, f"lr{self.lr:g}", f"s{self.seed}", self.config()["hash"]]
        return "-".join(re.sub(r"[^A-Za-z0-9.]+", "-", word) for word in words)


def short_hash(content: Any) -> str:
    """8 hexadecimal digits of any JSON-able content."""
    text = json.dumps(encode(content), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
