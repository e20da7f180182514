"""Watch: a run that is being watched, from its first step to its report."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import normkit
from normkit.diagnosis import TAKES, Diagnosis, Subject
from normkit.integrations.trackers import PREFIX, Trackers
from normkit.measure import updates
from normkit.measure.collect import Pending, fetched, packed
from normkit.measure.neighbours import read_neighbours
from normkit.measure.structure import norms_in, read_structure
from normkit.measure.untouched import original
from normkit.vocabulary.reading import Reading
from normkit.watching import processes
from normkit.watching.alarms import Alarms, say
from normkit.watching.directory import PAGE, RunDirectory, read_readings, unit_of
from normkit.watching.first_nan import Sentinel, trace
from normkit.watching.listening import Hooks, torch_optimizer
from normkit.watching.quantities import ALL, BACKWARD_PASSES, FORWARD_PASSES, OVERWRITTEN
from normkit.watching.run import diagnosis_of, nan_reading, structure_rows
from normkit.watching.sample import Batch, Wanted, of_the_batch, of_the_held_batch, of_the_step
from normkit.watching.spacing import Spacing

log = logging.getLogger("normkit.watch")
LOGGED = 400
"""Values that :meth:`Watch.log` keeps between two samples; of more, every second one goes."""


class Watch:
    """A run that is being watched: made by :func:`normkit.watch`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        wanted: Wanted,
        spacing: Spacing,
        out: str | Path | None,
        trackers: Trackers,
        process_group: Any,
    ) -> None:
        _refuse_sharded(model)
        self.model, self.optimizer, self.wanted, self.spacing = original(model), optimizer, wanted, spacing
        self.steps = spacing.next - 1
        """Optimizer steps so far."""
        self.samples = 0
        """How many of them were sampled."""
        self.first_nan: dict[str, Any] | None = None
        """Where the first value came from that is not finite; ``None``: there was none."""
        self.notes: list[str] = []
        """What could not be read, in sentences."""
        self._group = processes.group_of(model, process_group)
        self._overwrites = processes.overwrites(model)
        self._alone = self._group is not None or not _distributed()  # nobody waits for others that do not come
        self._writes = processes.rank() == 0
        self._trackers = trackers
        self._device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self._sentinel, self._alarms = Sentinel(self.model), Alarms(self._lacking())
        self._batch: Batch | None = None
        self._passes, self._backward, self._busy, self._closed = 0, 0, False, False
        self._pending: Pending = []
        self._weights: dict[str, Tensor] = {}
        self._logged: list[tuple[int, str, Tensor]] = []
        self._now, self._ended, self._publishing = (
            0.0,
            0.0,
            0.0,
        )  # seconds of this step, when the last ended, of writing
        self._due = spacing.due(self.steps + 1)
        self._counts = updates.counts(self.model)
        self._facts = {
            "class": type(self.model).__name__,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "norms": sum(1 for _ in norms_in(self.model)),
        }
        about = self._about()
        resumed = self.steps > 0
        self._directory = RunDirectory(Path(out), about, resumed=resumed) if out is not None and self._writes else None
        self._hooks = Hooks(model, optimizer, self, self._sentinel.weight)
        self._process = os.getpid()
        atexit.register(self._at_exit)

    # What the hooks call

    def forward_begins(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A forward pass. It counts where it trains; the first batch of a step is kept until the update."""
        if self._busy or not module.training or not torch.is_grad_enabled():
            return
        begin = time.perf_counter()
        self._passes += 1
        if self._batch is None and (self._due or self._device.type == "cpu"):
            self._batch = Batch.seen(self._device.type, args, kwargs, copy=self._due)
        self._now += time.perf_counter() - begin

    def backward_ends(self) -> None:
        """A backward pass; with gradient accumulation there are several in a step."""
        self._backward += not self._busy

    def before_update(self) -> None:
        """Gradients are there, and the weights are still those of the forward pass."""
        begin = self._settle()
        with self._at_work():
            step = self.steps + 1
            if self._sentinel.look(step):
                self._on_nan(step)
            if self._due:
                self._read(step)
        self._now += time.perf_counter() - begin

    def after_update(self) -> None:
        """The step is over."""
        begin = self._settle()
        self.steps += 1
        with self._at_work():
            if self._due:
                self._finish(begin)
        self._due = self.spacing.due(self.steps + 1)
        if self._due:
            self._counts = updates.counts(self.model)
        self._batch, self._passes, self._backward = None, 0, 0
        end = time.perf_counter()
        own = self._now + end - begin
        if self._ended:
            self.spacing.stepped(end - self._ended - own, own)
        self._now, self._ended = 0.0, end

    # A sample

    def _read(self, step: int) -> None:
        self._pending = of_the_step(self.model, self.wanted)
        if "statistics_moves" in self.wanted.quantities:
            self._pending += self.wanted.passed(self.model, list(updates.moves(self._counts, self.model, 1)))
        if self._batch is None:
            self._note("no batch was seen: the model is called inside of compiled code, or in another place")
        elif not self._alone:
            self._note("forward passes are not repeated in a process group that is not known; give process_group=")
        else:
            self._extra(lambda: of_the_batch(self.model, self.optimizer, self._batch, self.wanted))  # type: ignore[arg-type]
        if self.wanted.quantities & {"update_to_weight", "angle_per_step"}:
            self._weights = {
                name: p.detach().clone()
                for name, p in self.model.named_parameters()
                if p.requires_grad and p.grad is not None and p.dim() > 1
            }

    def _extra(self, read: Callable[[], Pending]) -> None:
        """What the step does not need: where it fails, that is said once, and the training goes on."""
        try:
            self._pending += read()
        except Exception as error:
            self._note(f"the forward pass could not be repeated ({type(error).__name__}: {error})")
            log.debug("the forward pass could not be repeated", exc_info=True)

    def _finish(self, begin: float) -> None:
        step, model = self.steps, self.model
        now = dict(model.named_parameters())
        moved = list(updates.read(self._weights, now, self.wanted.quantities)) if self._weights else []
        readings = updates.only_scale_free(packed([*self._pending, *self.wanted.passed(model, moved)], step))
        self._pending, self._weights = [], {}
        readings += self._told(step)
        try:
            readings += of_the_held_batch(model, self.wanted, step)
        except Exception as error:
            self._note(f"the held batch could not be measured ({type(error).__name__}: {error})")
        if (nan := self._sentinel.first()) is not None:
            self._on_nan(nan)
        cost = self._now + time.perf_counter() - begin
        usual = None
        if self._group is not None:
            numbers = [cost + self._publishing, self.spacing.step_seconds]
            apart, (cost, usual) = processes.compare(model, self._group, numbers, step)
            readings += apart
        start = time.perf_counter()
        self.samples += 1
        self._publish(step, readings)
        self._publishing = time.perf_counter() - start
        self.spacing.sampled(step, cost + (0.0 if self._group is not None else self._publishing), usual)

    def _told(self, step: int) -> list[Reading]:
        """What needs no measuring."""
        rates = [group["lr"] for group in torch_optimizer(self.optimizer).param_groups]
        logged, self._logged = self._logged, []
        values = fetched([value for _, _, value in logged])
        readings = [
            Reading(name, value, "", at, unit_of(name)) for (at, name, _), value in zip(logged, values, strict=True)
        ]
        readings.append(Reading("learning_rate", float(rates[0]), "", step))
        for quantity, passes in ((FORWARD_PASSES, self._passes), (BACKWARD_PASSES, self._backward)):
            if passes:  # none: they are in compiled code, where nobody counts them
                readings.append(Reading(quantity.name, float(passes), "", step, quantity.unit))
        if self._group is not None:
            readings.append(Reading(OVERWRITTEN.name, float(self._overwrites), "", step, OVERWRITTEN.unit))
        return readings

    def _unfinished(self) -> None:
        """Tell of a step that an error has ended: two forward passes under DDP can be such an error."""
        if self._overwrites and self._passes > 1:
            step = self.steps + 1
            readings = self._told(step)
            if not self._backward:
                readings.append(Reading(BACKWARD_PASSES.name, 0.0, "", step, BACKWARD_PASSES.unit))
            self.samples += 1
            self._publish(step, readings)

    def _publish(self, step: int, readings: list[Reading]) -> None:
        if not self._writes:
            return
        if self.samples == 1:
            self._alarms.structure = tuple(self._structure())
        if self._directory is not None:
            self._directory.sample(step, readings, self._progress())
            if self.samples == 1:
                self._directory.update(**self._about())
        self._trackers.values(scalars(readings, step), step)
        self._alarm(readings, step)

    def _alarm(self, readings: list[Reading], step: int) -> None:
        """Say what is new with these readings."""
        for finding in self._alarms.hear(readings, self._facts):
            say(finding, step)
            self._trackers.finding(finding, step)
            if self._directory is not None:
                self._directory.finding(finding, step)

    def _on_nan(self, step: int) -> None:
        """Trace the first one, once."""
        if self.first_nan is not None:
            return
        run = None if self._batch is None else lambda: self._batch.run(self.model)  # type: ignore[union-attr]
        batch = None if self._batch is None else (self._batch.args, self._batch.kwargs)
        self.first_nan = trace(self.model, run, batch, step)
        if self._writes:
            if self._directory is not None:
                self._directory.update(first_nan=self.first_nan)
            self._alarms.lost = (nan_reading(self.first_nan),)
            self._alarm([], step)

    # What a person calls

    def log(self, **values: Any) -> None:
        """Put numbers of the loop beside what is read: ``watched.log(loss=loss)``. A tensor is not waited for."""
        for name, value in values.items():
            own = isinstance(value, Tensor)
            kept = value.detach().clone().reshape(()) if own else torch.tensor(float(value), dtype=torch.float64)
            self._logged.append((self.steps, name, kept))
        if len(self._logged) > LOGGED:
            del self._logged[1::2]

    def diagnose(self) -> Diagnosis:
        """What the rules say about the run so far."""
        structure = self._structure()
        readings, facts = self._alarms.recent, [self._progress()]
        if self._directory is not None:
            readings, facts = read_readings(self._directory.path)
        found = diagnosis_of(self._about(), structure, readings, facts)
        return replace(found, subject=Subject(self.model, optimizer=torch_optimizer(self.optimizer)))

    @property
    def directory(self) -> Path | None:
        """Where the run is written to."""
        return None if self._directory is None else self._directory.path

    @property
    def overhead(self) -> dict[str, Any]:
        """``share`` of the training time, ``sample_ms``, ``step_ms``, ``interval`` (steps between samples)."""
        return self.spacing.told()

    def close(self) -> None:
        """Remove every hook, and write the report. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._hooks.remove()
        self._batch = None
        self._unfinished()
        atexit.unregister(self._at_exit)
        log.info("%r", self)
        if self._directory is not None:
            self._directory.update(**self._about(), closed=True)
            self.diagnose().to_html(self._directory.path / PAGE)
            self._directory.close()

    def _at_exit(self) -> None:
        if os.getpid() == self._process:  # not in a worker that was forked
            self.close()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        told = self.overhead
        where = "" if self.directory is None else f", in {self.directory}"
        nan = "" if self.first_nan is None else f"; the first NaN at step {self.first_nan['step']}"
        return (
            f"Watch: {self.steps} steps, {self.samples} sampled; {told['share']:.1%} of the time: one sample "
            f"{told['sample_ms']:.3g} ms, one step {told['step_ms']:.3g} ms, {told['interval']} steps apart{where}{nan}"
        )

    # Facts

    def _structure(self) -> list[Reading]:
        """What stands in the model, and what stands around its norms as far as its code says."""
        neighbours, _ = read_neighbours(self.model)
        return [*read_structure(self.model, torch_optimizer(self.optimizer)), *neighbours]

    def _about(self) -> dict[str, Any]:
        name = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else self._device.type
        return {
            "name": "watched run" if getattr(self, "_directory", None) is None else self._directory.path.name,  # type: ignore[union-attr]
            "model": self._facts,
            "asked": {"every": self.spacing.every, "budget": self.spacing.budget},
            **self._progress(),
            "processes": 1 if self._group is None else torch.distributed.get_world_size(self._group),
            "device": name,
            "lacking": dict(self._alarms.lacking),
            "structure": structure_rows(self._alarms.structure),
            "first_nan": self.first_nan,
            "notes": self.notes,
            "environment": {"normkit": normkit.__version__, "torch": torch.__version__},
        }

    def _progress(self) -> dict[str, Any]:
        return {"steps": self.steps, "samples": self.samples, "overhead": self.spacing.told()}

    def _lacking(self) -> dict[str, str]:
        """What nobody measures, and what that would take."""
        missing = {name: f"the quantity {name} in quantities=" for name in ALL if name not in self.wanted.quantities}
        missing |= {name: TAKES["probe"] for name, quantity in ALL.items() if quantity.stage == "probe"}
        if self._group is None:
            missing |= dict.fromkeys(("rank_spread", "buffers_overwritten"), "several processes")
        return {name: why for name, why in missing.items() if ALL[name].stage != "model"}

    def _note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)
            log.warning("%s", sentence)

    def _settle(self) -> float:
        """The time, at a sample once the device has done what the training gave it: that is not the sample's."""
        if self._due and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @contextlib.contextmanager
    def _at_work(self) -> Any:
        """A forward pass in here is our own."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False


def scalars(readings: Iterable[Reading], step: int) -> Mapping[str, float]:
    """What trackers get: ``norm/<quantity>/<module>``. Of parameters, which are hundreds, the directory tells."""
    return {
        "/".join(filter(None, (PREFIX, reading.quantity, reading.module))): float(reading.value)
        for reading in readings
        if reading.step == step
        and isinstance(reading.value, (int, float))
        and (reading.quantity not in ALL or ALL[reading.quantity].per != "parameter" or not reading.module)
    }


def _distributed() -> bool:
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def _refuse_sharded(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"watch: a {type(model).__name__} is no torch.nn.Module.\n  give the model that the loop calls")
    for module in model.modules():
        if any(base.__module__.startswith("torch.distributed.fsdp") for base in type(module).__mro__):
            raise TypeError(
                f"watch: {type(module).__name__} is sharded by FSDP, and a part of a weight tells little.\n"
                "  watch a short run that is not sharded, with DistributedDataParallel"
            )
