"""What ``nk.watch`` costs in a training step: between two samples, and at a sample; and that it changes no bit.

The share of the training time follows from the two: a sample's extra time over so many steps as keep it below the
budget, 50 at least.
"""

from __future__ import annotations

import copy
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import normkit as nk
from normkit.bench.cell import Effort, Record, time_steps
from normkit.bench.clock import Step
from normkit.bench.models import MODELS
from normkit.bench.peers import BASELINE
from normkit.bench.training import Trainee

WATCHED = ("resnet50", "transformer")
BETWEEN, SAMPLED = "normkit", "normkit, sampled step"
VARIANTS: dict[str, int | None] = {BASELINE: None, BETWEEN: 10**9, SAMPLED: 1}
"""By name, steps between two samples; ``None``: nobody watches."""
EVERY, BUDGET = 50, 0.02
"""As :func:`normkit.watch` has them by default."""
STEPS = 3
"""That the comparison bit for bit takes."""


def measure(name: str, dtype: str, effort: Effort, device: str = "cpu") -> list[Record]:
    """One record per variant; the first two steps of each are over before it is timed.

    Nothing is timed where a watched run is not bit for bit the unwatched one.
    """
    setting = MODELS[name]
    about = {"kind": "watch", "op": name, "dtype": dtype, "layout": "contiguous", "device": device}
    about["reason"] = setting.told
    x, targets = (tensor.to(device) for tensor in setting.batch())
    state = torch.get_rng_state()
    torch.manual_seed(0)
    plain = setting.make().to(device).train()
    torch.set_rng_state(state)
    trainee = lambda: (lambda model: Trainee(model, model, setting, x, targets, dtype))(copy.deepcopy(plain))
    with tempfile.TemporaryDirectory() as place:
        if other := different(trainee(), trainee(), Path(place) / "same"):
            why = f"a watched run is not bit for bit the unwatched one: {', '.join(other[:4])}"
            return [{**about, "implementation": BETWEEN, "state": "refused", "why": why}]
        records: dict[str, Record] = {}
        steps: dict[str, Step] = {}
        watches: list[Any] = []
        for variant, every in VARIANTS.items():
            one = trainee()
            if every is not None:
                out = Path(place) / variant
                watches.append(nk.watch(one.model, one.optimizer, every=every, out=out, budget=None))
            for _ in range(2):
                one.step().finish(one.step().forward())
            records[variant] = {**about, "implementation": variant, "state": "measured", "identical": True}
            steps[variant] = one.step()
        for variant, told in time_steps(steps, effort, device).items():
            records[variant].update(told)
        for watch in watches:
            watch.close()
    records[SAMPLED]["watch"] = cost(records)
    return list(records.values())


def cost(records: dict[str, Record]) -> Record:
    """How far apart samples are at the budget, and the share of the time that watching then takes, by the medians."""
    plain, between, sampled = (records[variant]["step"]["ms"] for variant in VARIANTS)
    interval = max(EVERY, math.ceil(max(0.0, sampled - plain) / (BUDGET * plain)))
    own = max(0.0, between - plain) * (interval - 1) + max(0.0, sampled - plain)
    return {
        "sample_ms": sampled - plain,
        "between_ms": between - plain,
        "interval": interval,
        "share": own / (interval * plain),
    }


def different(alone: Trainee, beside: Trainee, out: Path) -> list[str]:
    """Names of parameters and buffers that come out otherwise, where one of the two runs is watched at every step."""
    with nk.watch(beside.model, beside.optimizer, every=1, out=out, budget=None):
        for _ in range(STEPS):
            for trainee in (alone, beside):
                step = trainee.step()
                step.finish(step.forward())
    states = zip(_state(alone.model), _state(beside.model), strict=True)
    return [name for (name, one), (_, other) in states if not torch.equal(one, other)]


def _state(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
