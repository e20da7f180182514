"""attach: strategies in anybody's training loop. Readings -> strategy -> prescriptions -> surgery, between two steps.

Everything happens in a hook behind the optimizer's step. What was done, and by how much it moved the outputs, is in
:attr:`Attached.record`; a switch that fails leaves the model as it was, and says so there and in the log.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim

from normkit.clipping import clip_adaptively_before_steps
from normkit.loop.outputs import MOVED, Batch, example_inputs, few, moved, outputs, samples
from normkit.loop.readings import Readings
from normkit.loop.step_size import StepSize
from normkit.measure.untouched import original
from normkit.stepping import takes_its_step
from normkit.strategies.coupling import KEEP, Coupling
from normkit.strategies.recalibrate import Recalibrate
from normkit.strategies.strategy import Strategy, flattened
from normkit.strategies.text import parse
from normkit.strategies.trigger import Moment
from normkit.surgery.carry_out import carry_out
from normkit.vocabulary.certificate import Certificate
from normkit.vocabulary.prescription import Prescription

log = logging.getLogger(__name__)
_VALUES_ONLY = ("calibrate_", "merge_statistics_")  # what a checkpoint holds anyway


def attach(
    model: nn.Module,
    optimizer: optim.Optimizer,
    strategy: Strategy | str | Sequence[Strategy],
    *,
    total_steps: int | None = None,
    steps_per_epoch: int | None = None,
    scheduler: Any = None,
    loader: Iterable[Any] | None = None,
    every: int = 10,
    out: str | Path | Callable[[dict[str, Any]], object] | None = None,
) -> Attached:
    """Let a strategy act on a model while it trains, in any loop, from now until the ``with`` block ends.

    Args:
        model: the model that is trained; compiled, or wrapped in DistributedDataParallel, as it may be.
        optimizer: its optimizer; the strategy acts behind each ``optimizer.step()``, and parameters that come or go
            join or leave it.
        strategy: one of :mod:`normkit.strategies`, its text (``"batch -> frozen@25% lr/10"``), or several that act
            beside each other.
        total_steps: optimizer steps of the whole run; for points written in percent.
        steps_per_epoch: for points written in epochs.
        scheduler: the scheduler of the learning rate, where there is one and the strategy changes the rate.
        loader: batches for ``Recalibrate``.
        every: steps between two measurements, where the strategy reads any.
        out: a file that gets one line of JSON per switch, or a function that gets it as a dict.

    Returns:
        A context manager; :meth:`Attached.close` ends it too. It holds on to the last batch.

    Raises:
        ValueError: the strategy asks for what was not given; the message names the argument.

    >>> import torch, normkit as nk
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), nk.BatchNorm1d(8), torch.nn.Linear(8, 2))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with nk.strategies.attach(model, optimizer, "batch -> frozen@50% lr/10", total_steps=4) as attached:
    ...     for step in range(4):
    ...         optimizer.zero_grad()
    ...         model(torch.randn(16, 4)).square().mean().backward()
    ...         optimizer.step()
    >>> [line["step"] for line in attached.record], model[1].frozen, round(optimizer.param_groups[0]["lr"], 6)
    ([2], True, 0.01)

    When not to use it: before a run without it has been looked at. docs/strategies.md has what was measured, the cases
    in which a switch destroys training among it.
    """
    attached = Attached(
        model,
        optimizer,
        strategy,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        scheduler=scheduler,
        loader=loader,
        every=every,
        out=out,
    )
    return attached.listen()


class Attached:
    """What :func:`attach` gives: it acts behind each optimizer step, and keeps account of what it has done.

    A loop that knows its own steps may do without hooks: not :meth:`listen`, but :meth:`after_step`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        strategy: Strategy | str | Sequence[Strategy],
        *,
        total_steps: int | None = None,
        steps_per_epoch: int | None = None,
        scheduler: Any = None,
        loader: Iterable[Any] | None = None,
        every: int = 10,
        out: str | Path | Callable[[dict[str, Any]], object] | None = None,
    ) -> None:
        self.outer, self.model = model, original(model)
        self.optimizer, self.loader, self.out = optimizer, loader, out
        self.strategies = _several(strategy)
        self.moment = Moment(0, total_steps, steps_per_epoch)
        self.step_size = StepSize(optimizer, scheduler)
        self.readings = Readings(frozenset().union(*(s.needs for s in self.strategies)), every)
        self._check()
        self.states = [s.init(self.model, optimizer) for s in self.strategies]
        self.record: list[dict[str, Any]] = []
        """What was done, a line per switch."""
        self.carried: list[tuple[list[Prescription], Any]] = []
        """What changed the model, and an example of what it was run on: a resumed run does it again."""
        self.batch: Batch | None = None
        self._clip: Any = None
        self._wrapped = model if isinstance(model, nn.parallel.DistributedDataParallel) else None
        self._compiled = self.model is not model or model._compiled_call_impl is not None
        self._handles: list[Any] = []

    def listen(self) -> Attached:
        """Put the hooks on."""
        self._handles = [
            self.outer.register_forward_pre_hook(self._note, with_kwargs=True),
            self.optimizer.register_step_post_hook(self._stepped),
        ]
        return self

    def _stepped(self, optimizer: Any, *_: Any) -> None:
        if takes_its_step(optimizer):
            self.after_step(self.batch)

    def __deepcopy__(self, memo: dict) -> Attached:
        """A copy of the model has a copy of the hook, and it is this one's business no more than before."""
        return self

    def _check(self) -> None:
        each = [one for s in self.strategies for one in flattened(s)]
        for strategy in each:
            strategy.check(self.moment)
            self.step_size.check(strategy.coupling)
        if any(isinstance(strategy, Recalibrate) for strategy in each) and self.loader is None:
            raise ValueError("attach: a strategy recalibrates, and there are no data for it: give loader=")

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the hooks off. The model and the learning rate stay as they are."""
        for handle in self._handles:
            handle.remove()
        if self._clip is not None:
            self._clip.remove()
        self.batch = None

    def log(self, loss: float | Tensor) -> None:
        """Tell of the loss of this step, before ``optimizer.step()``; for a strategy that waits for a plateau."""
        if not self.readings.of_the_loss:  # a look at it waits for the device
            return
        self.readings.loss(float(loss.detach() if isinstance(loss, Tensor) else loss), self.moment.step + 1)

    def _note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if module.training and module is self.outer:
            self.batch = args, kwargs

    def after_step(self, batch: Batch | None) -> None:
        """The optimizer has taken a step on this batch, ``(args, kwargs)``; its gradients are still there."""
        self.batch = batch
        self.moment = Moment(self.moment.step + 1, self.moment.total, self.moment.per_epoch)
        self.step_size.after_step()
        self.readings.read(self.model, self.batch, self.moment.step)
        evidence = self.readings.evidence
        for strategy, state in zip(self.strategies, self.states, strict=True):
            found = strategy.update(state, self.moment, evidence)
            if found:
                self._switch(strategy, strategy.coupled(state), found)

    def _switch(self, strategy: Strategy, coupling: Coupling, prescriptions: list[Prescription]) -> None:
        """Carry out, compare, write down."""
        line: dict[str, Any] = {
            "step": self.moment.step,
            "strategy": str(strategy),
            "action": "; ".join(dict.fromkeys(p.action for p in prescriptions)),
        }
        before, held = outputs(self.model, self.batch), {id(p) for p in self.model.parameters()}
        try:
            given = self._given()
            certificates = carry_out(self.model, prescriptions, given=given)
        except Exception as error:
            self._fail(line, f"{type(error).__name__}: {error}")
            return
        if _is_so_already(certificates):
            self._couple(coupling)
            if coupling != KEEP:
                self._write({**line, "changed": 0, "refused": 0, "coupling": str(coupling)} | dict.fromkeys(MOVED, 0.0))
            return
        if reason := self._reason_against(certificates, held):
            for certificate in reversed(certificates):
                if certificate.changed:
                    certificate.undo()
            self._fail(line, reason)
            return
        _same_everywhere(self.model)
        if self._wrapped is not None:
            self._wrapped._assign_modules_buffers()  # it broadcasts those that it found when it was built
        if self._compiled:
            torch.compiler.reset()  # its guards do not look at the class of every layer
        self.carried.append((list(prescriptions), few(given.get("match"))))
        self._couple(coupling)
        line |= {
            "changed": sum(len(certificate.changed) for certificate in certificates),
            "refused": sum(len(certificate.refused) for certificate in certificates),
            "coupling": str(coupling),
        }
        self._write(line | moved(before, outputs(self.model, self.batch)))

    def _fail(self, line: dict[str, Any], reason: str) -> None:
        log.warning("step %d: %s failed, and the model is as it was: %s", self.moment.step, line["action"], reason)
        self._write({**line, "failed": reason})

    def _reason_against(self, certificates: Sequence[Certificate], held: set[int]) -> str | None:
        """Why what was done must not stand; ``None``: it may."""
        if not any(certificate.changed for certificate in certificates):
            refused = [row.reason for certificate in certificates for row in certificate.refused]
            return f"nothing was changed{': ' if refused else ''}{'; '.join(dict.fromkeys(refused))}"
        if self._wrapped is not None and held != {id(p) for p in self.model.parameters()}:
            return "parameters come or go, and DistributedDataParallel averages those that there were when it was built"
        return None

    def _given(self) -> dict[str, Any]:
        given: dict[str, Any] = {"optimizer": self.optimizer, "loader": self.loader}
        if self.batch is not None and samples(self.batch) >= 2:
            given["match"] = given["example_inputs"] = example_inputs(self.model, self.batch)
        return given

    def _couple(self, coupling: Coupling) -> None:
        self.step_size.couple(coupling)
        if coupling.clip is not None:
            self._clip_from_now(coupling.clip)

    def _clip_from_now(self, clip: float) -> None:
        if self._clip is not None:
            self._clip.remove()
        self._clip = clip_adaptively_before_steps(self.optimizer, clip)
        self.step_size.clip = clip

    def _write(self, line: dict[str, Any]) -> None:
        self.record.append(line)
        if self.out is None or (dist.is_initialized() and dist.get_rank()):
            return
        if callable(self.out):
            self.out(line)
            return
        path = Path(self.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors: what a checkpoint has to hold beside model and optimizer."""
        return {
            "step": self.moment.step,
            "states": self.states,
            "step_size": self.step_size.state_dict(),
            "readings": self.readings.state_dict(),
            "record": self.record,
            "carried": [([_plain(p) for p in group], example) for group, example in self.carried],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a run was left: the model, as it was built, becomes the kind of model that it was then.

        Call it before ``model.load_state_dict`` and ``optimizer.load_state_dict``, which bring the numbers.

        Raises:
            ValueError: a checkpoint of other strategies.
        """
        if len(state["states"]) != len(self.states):
            raise ValueError(
                f"attach: the checkpoint has {len(state['states'])} strategies, and {len(self.states)} are attached.\n"
                "  attach the strategies that it was made with"
            )
        for group, example in state["carried"]:
            prescriptions = [Prescription(**{**p, "options": tuple(map(tuple, p["options"]))}) for p in group]
            structural = [p for p in prescriptions if p.operation not in _VALUES_ONLY]
            if structural:
                carry_out(
                    self.model,
                    structural,
                    given={"optimizer": self.optimizer, "match": example, "example_inputs": example},
                )
            self.carried.append((prescriptions, example))
        self.moment = Moment(state["step"], self.moment.total, self.moment.per_epoch)
        self.states, self.record = state["states"], list(state["record"])
        self.readings.load_state_dict(state["readings"])
        self.step_size.load_state_dict(state["step_size"])
        if self.step_size.clip is not None:
            self._clip_from_now(self.step_size.clip)


def refuse_resumed(step: int) -> None:
    """For hosts whose checkpoints do not hold where a strategy is.

    Raises:
        RuntimeError: steps have been taken before.
    """
    if step:
        raise RuntimeError(
            f"the run is resumed at step {step}, and its checkpoint does not say where the strategy was.\n"
            "  use normkit.strategies.attach in a loop of your own, whose checkpoints hold attached.state_dict()"
        )


def _several(strategy: Strategy | str | Sequence[Strategy]) -> list[Strategy]:
    given = [strategy] if isinstance(strategy, (Strategy, str)) else list(strategy)
    return [parse(each) if isinstance(each, str) else each for each in given]


def _is_so_already(certificates: Sequence[Certificate]) -> bool:
    """Nothing was to be done: two increments of a ramp may come to the same number."""
    rows = [row for certificate in certificates for row in (*certificate.skipped, *certificate.refused)]
    return not any(c.changed for c in certificates) and any(row.reason.endswith("already") for row in rows)


def _same_everywhere(model: nn.Module) -> None:
    """What was fitted on one process's batch is every process's."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor, 0)


def _plain(prescription: Prescription) -> dict[str, Any]:
    names = ("action", "module", "reason", "safety", "detail", "operation")
    return {name: getattr(prescription, name) for name in names} | {"options": [list(o) for o in prescription.options]}
