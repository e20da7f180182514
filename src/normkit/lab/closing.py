"""What is measured once a final run has ended, on the trained network: nothing here can touch the run any more."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from normkit.lab.arm import Arm
from normkit.lab.data import Data, Split
from normkit.lab.norm_layer import norms_of
from normkit.lab.probe import SAMPLES, by_unit, untouched_generators

MEASURES = ("norm_share", "dead_units", "variance_ratio")
RELUS = (nn.ReLU, nn.ReLU6)
SHARE_PAIRS, SHARE_SECONDS = 20, 0.5  # steps timed with and without norms: at most this many, for at most this long
LEAST_PAIRS = 3


def measure(model: nn.Module, data: Data, arm: Arm, take_step: Callable[[nn.Module], float] | None) -> dict[str, Any]:
    """All of MEASURES; take_step: see `norm_share`, or None where it cannot be known: several processes trained."""
    return {
        "norm_share": None if take_step is None else norm_share(model, take_step),
        "dead_units": dead_units(model, data.test),
        "variance_ratio": variance_ratios(model, data.validation.first(SAMPLES)[0])
        if arm.dropout and take_step
        else None,
    }


@torch.no_grad()
def dead_units(model: nn.Module, test: Split) -> float | None:
    """Share of ReLU units that are zero for every test sample (a channel: at every position); None without ReLU."""
    alive: dict[tuple[str, int], Tensor] = {}
    calls: dict[str, int] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            key = name, calls.get(name, 0)  # a module that is called twice has two layers of units
            calls[name] = key[1] + 1
            active = (by_unit(output) > 0).any(0)
            alive[key] = alive[key] | active if key in alive else active

        return hook

    hooks = [m.register_forward_hook(look(name)) for name, m in model.named_modules() if isinstance(m, RELUS)]
    model.eval()
    try:
        for inputs, _ in test.chunks():
            calls.clear()
            model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if not alive:
        return None
    units = torch.cat(list(alive.values()))
    return 1 - float(units.float().mean())


@torch.no_grad()
def variance_ratios(model: nn.Module, batch: Any) -> dict[str, float]:
    """Per norm layer: variance of its input in evaluation over variance in training, for the same samples.

    The variance shift of dropout in front of a norm (Li et al. 2019, arXiv:1801.05134): 1 means none. The variance is
    the mean over the units of the variance over the samples.
    """
    in_training: dict[str, float] = {}
    in_evaluation: dict[str, float] = {}
    for training, seen in ((True, in_training), (False, in_evaluation)):
        replica = copy.deepcopy(model).train(training)
        for name, norm in norms_of(replica).items():
            norm.register_forward_pre_hook(
                lambda _, inputs, name=name, seen=seen: seen.__setitem__(name, _variance(inputs[0]))
            )
        with untouched_generators():
            torch.manual_seed(0)
            replica(batch)
    return {name: in_evaluation[name] / variance for name, variance in in_training.items() if variance > 0}


def norm_share(model: nn.Module, take_step: Callable[[nn.Module], float]) -> float:
    """Share of a training step that the norms cost: the step against the same step with identities in their place.

    take_step: takes one step with a model and returns its seconds. Both models are copies, and their steps alternate,
    so that a slow moment of the machine hits both. Identities bring out what hooks would hide: the norms' parameters in
    the optimizer, and no clock inside the step.
    """
    if all(isinstance(norm, nn.Identity) for norm in norms_of(model).values()):
        return 0.0
    with_norms, without = copy.deepcopy(model).train(), _without_norms(copy.deepcopy(model)).train()
    with untouched_generators():
        pairs = list(in_turns(lambda: take_step(with_norms), lambda: take_step(without)))
    median_with, median_without = (statistics.median(times) for times in zip(*pairs, strict=True))
    return max(0.0, 1 - median_without / median_with)


def in_turns(first: Callable[[], float], second: Callable[[], float]) -> Iterable[tuple[float, float]]:
    """What two ways of doing something take, in turns, until it is known well enough or has taken long enough."""
    for measure in (first, second):
        measure()  # warm up: allocations and the first dispatch of a new graph
    begin = time.perf_counter()
    for count in range(SHARE_PAIRS):
        if count >= LEAST_PAIRS and time.perf_counter() - begin > SHARE_SECONDS:
            return
        yield first(), second()


def _without_norms(model: nn.Module) -> nn.Module:
    for name in norms_of(model):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Identity())
    return model


def _variance(x: Tensor) -> float:
    return float(by_unit(x).var(0, correction=0).mean())


def greatest_memory_mb() -> float | None:
    """Greatest resident memory of this process since `forget_greatest_memory`, in MB of 10^6 bytes; None if unknown."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            line = next(line for line in file if line.startswith("VmHWM"))
        return round(int(line.split()[1]) * 1024 / 1e6, 1)
    except (OSError, StopIteration, ValueError):
        return None


def forget_greatest_memory() -> None:
    """Starts the mark of greatest memory again (Linux; elsewhere the mark of the process stays)."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        pass
