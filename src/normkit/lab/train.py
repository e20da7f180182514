"""The one training loop of the lab, and the one place (`between_steps`) where something may act between its steps.

A search run stops when it reaches the target. A final run takes all its steps, whoever was first: test values compare
networks that were trained equally long. The clock runs during forward, backward and update only; fetching a batch,
evaluating, probing and saving are not in `train_seconds`. Several processes may train one network (`Ranks`); each runs
this loop.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normkit.lab import checkpoint, closing, folded, recomputed
from normkit.lab.build import build_model, build_optimizer, seed_everything
from normkit.lab.cell import FINAL, Cell
from normkit.lab.data import Data, Order, Split
from normkit.lab.experiment import Experiment
from normkit.lab.journal import Journal
from normkit.lab.probe import Probe, untouched_generators
from normkit.lab.ranks import ALONE, Ranks
from normkit.lab.seeds import derive
from normkit.lab.step import Step
from normkit.lab.switching import Switching

DIVERGED = 1e3  # times the first loss: Bjorck et al. 2018 (arXiv:1806.02375) call that divergence
WARM_UP = 2
MEDIAN_OF = 5000  # ms_per_step is the median of this many last steps: a checkpoint must not grow with the run


@dataclass
class State:
    """What a run knows about itself, as a checkpoint keeps it."""

    step: int = 0
    train_seconds: float = 0.0
    cpu_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    first_loss: float | None = None
    loss_sum: float = 0.0  # since the last evaluation
    loss_count: int = 0
    best_validation: float | None = None
    steps_to_target: int | None = None
    seconds_to_target: float | None = None


class Taken(NamedTuple):
    """One step: the loss of its batch before it, and what it cost by the clock and by the processor."""

    loss: float
    seconds: float
    cpu_seconds: float


class Run:
    """One cell being trained in its directory; `train` is the only way in."""

    def __init__(
        self,
        cell: Cell,
        experiment: Experiment,
        data: Data,
        directory: Path,
        checkpoint_seconds: float,
        ranks: Ranks = ALONE,
    ):
        self.cell, self.experiment, self.data, self.directory = cell, experiment, data, directory
        self.checkpoint_seconds, self.ranks = checkpoint_seconds, ranks
        arm = cell.trained_arm
        self.model, self.initial_weights = build_model(experiment, arm, cell.seed)
        self.optimizer = build_optimizer(experiment, arm, self.model, cell.lr)
        self.order = Order(len(data.train), cell.batch_size, cell.seed)
        self.state = State()
        self.metrics, self.inside = Journal(directory / "metrics.jsonl"), Journal(directory / "inside.jsonl")
        self.between_steps: list[Callable[[Step], None]] = [copy.deepcopy(act) for act in experiment.between_steps]
        self.switching: Switching | None = None
        if arm.strategy:
            self.switching = Switching(arm.strategy, self.model, self.optimizer, cell.steps)
            self.between_steps.insert(0, self.switching)
        if cell.phase == FINAL and ranks.alone:  # its forward pass is this process's own: others would wait for it
            batch, _ = data.validation.first(experiment.probed)
            self.between_steps.append(Probe(self.inside, batch, cell.steps))
        seed_everything(derive(cell.seed, "training", *([] if ranks.alone else [ranks.rank])))

    def go(self) -> dict[str, Any]:
        """Trains from the checkpoint, or from the beginning, to the end; returns what status.json says about it."""
        try:
            self._resume()
            self._warm_up()
            return self._measure(self._loop())
        finally:
            self.metrics.close()
            self.inside.close()

    def _loop(self) -> str | None:
        """Takes steps until the run is over; returns why it diverged, or None."""
        cell, state, saved_at = self.cell, self.state, time.monotonic()
        pause = self.checkpoint_seconds
        while state.step < cell.steps and not self._search_is_over():
            inputs, targets = self._batch(state.step)
            taken = self._take_step(self.model, self.optimizer, inputs, targets)
            self._count(taken)
            if reason := self._diverged(taken.loss):
                self._write_metrics()
                return reason
            step = Step(state.step, cell.steps, self.model, self.optimizer, inputs, targets, taken.loss)
            for act in self.between_steps:
                act(step)
            if state.step % cell.eval_every == 0 or state.step == cell.steps:
                self._write_metrics()
            if time.monotonic() - saved_at > pause:
                begin = time.monotonic()
                self._save()
                saved_at = time.monotonic()
                pause = max(self.checkpoint_seconds, 20 * (saved_at - begin))  # saving stays below 5 % of the time
        return None

    def _batch(self, step: int) -> tuple[Any, Tensor]:
        """Inputs and targets of a step, as far as they are this process's."""
        return self.data.train.take(self.ranks.part(self.order.batch(step)))

    def _take_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Any, targets: Tensor) -> Taken:
        """One optimizer step."""
        begin, cpu = time.perf_counter(), time.process_time()
        if self.experiment.update is not None:
            value = float(self.experiment.update(model, optimizer, inputs, targets))
        else:
            optimizer.zero_grad()
            loss = self.experiment.loss(model(inputs), targets)
            loss.backward()
            value = self.ranks.average(model, loss.item())
            optimizer.step()
        return Taken(value, time.perf_counter() - begin, time.process_time() - cpu)

    def _count(self, taken: Taken) -> None:
        state = self.state
        state.step += 1
        state.train_seconds += taken.seconds
        state.cpu_seconds += taken.cpu_seconds
        state.step_seconds.append(taken.seconds)
        del state.step_seconds[:-MEDIAN_OF]
        state.first_loss = taken.loss if state.first_loss is None else state.first_loss
        state.loss_sum += taken.loss
        state.loss_count += 1

    def _diverged(self, loss: float) -> str | None:
        first = self.state.first_loss or 0.0
        if not math.isfinite(loss):
            return f"the loss became {loss} at step {self.state.step}"
        if loss > DIVERGED * max(first, 1e-12):
            return f"the loss rose to {loss:.3g} at step {self.state.step}, {DIVERGED:g} times the first ({first:.3g})"
        return None

    def _search_is_over(self) -> bool:
        return self.cell.phase != FINAL and self.state.steps_to_target is not None

    def _write_metrics(self) -> None:
        """Evaluates on the validation data and appends one line."""
        state, metric = self.state, self.experiment.metric
        value, loss = self.ranks.first(*self._evaluate(self.data.validation))
        if state.best_validation is None or metric.better(value, state.best_validation):
            state.best_validation = value
        if state.steps_to_target is None and metric.reached(value, self.cell.target):
            state.steps_to_target, state.seconds_to_target = state.step, state.train_seconds
        self.metrics.append(
            {
                "step": state.step,
                "seconds": round(state.train_seconds, 6),
                "train_loss": state.loss_sum / max(1, state.loss_count),
                "validation_loss": loss,
                "validation": value,
            }
        )
        state.loss_sum, state.loss_count = 0.0, 0

    @torch.no_grad()
    def _evaluate(self, split: Split) -> tuple[float, float]:
        """Metric and loss of all outputs of a split together, in evaluation mode."""
        self.model.eval()
        outputs, targets = zip(*((self.model(x), y) for x, y in split.chunks()), strict=True)
        self.model.train()
        together, truth = torch.cat(outputs), torch.cat(targets)
        return float(self.experiment.metric.function(together, truth)), float(self.experiment.loss(together, truth))

    def _warm_up(self) -> None:
        """Takes throw-away steps with a copy: the first steps of a process pay for allocations, and no arm should."""
        replica = copy.deepcopy(self.model)
        optimizer = build_optimizer(self.experiment, self.cell.trained_arm, replica, 0.0)
        with untouched_generators():  # a dataset may draw too
            inputs, targets = self._batch(0)
            for _ in range(WARM_UP):
                self._take_step(replica, optimizer, inputs, targets)

    def _save(self) -> None:
        for journal in (self.metrics, self.inside):
            journal.sync()
        checkpoint.save(
            self.directory,
            {
                "hash": self.cell.config()["hash"],
                "state": asdict(self.state),
                "model": checkpoint.model_state(self.model),
                "optimizer": self.optimizer.state_dict(),
                "random": checkpoint.random_state(),
                "offsets": [self.metrics.offset, self.inside.offset],
                "between_steps": [
                    act.state_dict() if hasattr(act, "state_dict") else None for act in self.between_steps
                ],
            },
        )

    def _resume(self) -> None:
        """Goes back to the checkpoint: journals are cut to its offsets, so no line is doubled and none is missing."""
        saved = checkpoint.load(self.directory)
        offsets = saved["offsets"] if saved else [0, 0]
        beyond = self.metrics.offset < offsets[0] or self.inside.offset < offsets[1]
        if saved is None or saved["hash"] != self.cell.config()["hash"] or beyond:
            offsets, saved = [0, 0], None
        for journal, offset in zip((self.metrics, self.inside), offsets, strict=True):
            journal.cut(offset)
        if saved is None:
            return
        self.state = State(**saved["state"])
        for act, state in zip(self.between_steps, saved["between_steps"], strict=True):
            if state is not None:
                act.load_state_dict(state)  # type: ignore[attr-defined]
        checkpoint.restore_model(self.model, saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        checkpoint.restore_random(saved["random"])

    def _measure(self, reason: str | None) -> dict[str, Any]:
        """What status.json says about the run; test data are seen by final runs only, and only here."""
        state = self.state
        measured: dict[str, Any] = {
            "state": "diverged" if reason else "done",
            "reason": reason,
            "steps": state.step,
            "train_seconds": round(state.train_seconds, 6),
            "cpu_seconds": round(self.ranks.total(state.cpu_seconds), 6),
            "steps_to_target": state.steps_to_target,
            "seconds_to_target": None if state.seconds_to_target is None else round(state.seconds_to_target, 6),
            "best_validation": state.best_validation,
            "test": None,
            "ms_per_step": 1e3 * statistics.median(state.step_seconds),
            "parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "initial_weights": self.initial_weights,
            **dict.fromkeys((*closing.MEASURES, *recomputed.MEASURES, *folded.MEASURES)),
        }
        if self.switching is not None:
            measured |= self.switching.measure(state.step_seconds, state.step)
        if self.cell.phase == FINAL:
            measured["test"] = self._evaluate(self.data.test)[0]
            arm, extra_step = self.cell.trained_arm, self._extra_step() if self.ranks.alone else None
            measured |= closing.measure(self.model, self.data, arm, extra_step)
            measured |= recomputed.measure(self.model, self.experiment, arm, self.data, self.cell.batch_size)
            for act in self.between_steps:
                if hasattr(act, "conclude"):
                    measured |= act.conclude(self.model, self.data)
            if self.experiment.fold and reason is None:
                measured |= folded.measure(self.model, self.data, self.cell.batch_size)
        return measured

    def _extra_step(self) -> Callable[[nn.Module], float]:
        """A function that takes one more step with a copy of the model, at rate 0, and returns its seconds."""
        inputs, targets = self._batch(0)
        optimizers: dict[int, torch.optim.Optimizer] = {}

        def take_step(model: nn.Module) -> float:
            if id(model) not in optimizers:
                optimizers[id(model)] = build_optimizer(self.experiment, self.cell.trained_arm, model, 0.0)
            return self._take_step(model, optimizers[id(model)], inputs, targets).seconds

        return take_step


def train(
    cell: Cell,
    experiment: Experiment,
    data: Data,
    directory: Path,
    checkpoint_seconds: float = 2.0,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Trains one cell in its directory, from its checkpoint if it has one; returns the measured part of status.json."""
    return Run(cell, experiment, data, directory, checkpoint_seconds, ranks).go()
