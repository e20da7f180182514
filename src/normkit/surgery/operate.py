"""The operating table: a plan is applied as a whole or not at all, verified, and certified.

Whoever changes a model writes a function that looks and plans (nothing is changed while it does) and hands the plan to
:func:`operate`. An :class:`Edit` is the smallest change there is; it knows how to take itself back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from normkit.surgery import probe
from normkit.surgery.preserve import Snapshot
from normkit.vocabulary.certificate import Certificate, Untouched
from normkit.vocabulary.prescription import Prescription
from normkit.vocabulary.reading import Reading


class Edit(Protocol):
    """One change of one module."""

    def apply(self) -> None:
        """Make the change; when this raises, nothing has been changed."""

    def revert(self) -> None:
        """Take the change back."""

    def objections(self) -> list[str]:
        """Why it can no longer be taken back: somebody has changed the same place since. Empty: it can."""


@dataclass(frozen=True)
class Step:
    """A prescription with the edit that carries it out."""

    prescription: Prescription
    edit: Edit


@dataclass
class Plan:
    """What an operation is going to do to a model, before anything is done. Its ``repr`` is a table."""

    operation: str
    model: nn.Module
    steps: list[Step] = field(default_factory=list)
    skipped: list[Untouched] = field(default_factory=list)
    refused: list[Untouched] = field(default_factory=list)
    changes: set[str] = field(default_factory=set)
    """Facts of :mod:`normkit.surgery.preserve` that are meant to change; every other one must not."""
    readings: list[Reading] = field(default_factory=list)
    """What was measured on the way."""
    notes: list[str] = field(default_factory=list)
    """Sentences about the whole."""

    def add(self, prescription: Prescription, edit: Edit) -> None:
        self.steps.append(Step(prescription, edit))

    def skip(self, module: str, reason: str) -> None:
        self.skipped.append(Untouched(module, reason))

    def refuse(self, module: str, reason: str) -> None:
        self.refused.append(Untouched(module, reason))

    def __repr__(self) -> str:
        return repr(self.certificate())

    def certificate(self) -> Certificate:
        """What would be done, as the account of an operation that has not taken place."""
        return self._certificate(f"{self.operation} (planned)")

    def _certificate(self, operation: str, **measured: Any) -> Certificate:
        changed = tuple(step.prescription for step in self.steps)
        return Certificate(
            operation,
            changed,
            tuple(self.skipped),
            tuple(self.refused),
            readings=tuple(self.readings),
            notes=tuple(self.notes),
            **measured,
        )


def operate(plan: Plan, *, example_inputs: Any = None, dry_run: bool = False) -> Certificate:
    """Apply a plan, verify it, and certify it. Whatever goes wrong, the model is left as it was.

    Args:
        plan: made by the operation.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. The model runs on it before and
            after, in each mode in which the plan promises the same outputs; buffers, modes and random state are put
            back. ``None``: the structure is verified, the numbers are not.
        dry_run: do nothing, and certify what would be done.

    Raises:
        RuntimeError: the result is not what the plan promised; the message says by how much.
    """
    if dry_run:
        return plan.certificate()
    if not plan.steps:
        return plan._certificate(plan.operation)
    modes = sorted(set.intersection(*(set(step.prescription.modes) for step in plan.steps)))
    before = [] if example_inputs is None else [probe.run(plan.model, example_inputs, training=mode) for mode in modes]
    snapshot = Snapshot.of(plan.model)
    done: list[Step] = []
    try:
        for step in plan.steps:
            step.edit.apply()
            done.append(step)
        if losses := snapshot.losses(plan.model, plan.changes):
            raise RuntimeError(_failed(plan, losses))
        agreement = tuple(probe.agreement(plan.model, example_inputs, then, plan.changes) for then in before)
        if far := [row for row in agreement if not row.error <= row.limit]:
            raise RuntimeError(_failed(plan, [_moved(row.training, row.error, row.limit) for row in far]))
    except BaseException:
        for step in reversed(done):
            step.edit.revert()
        raise
    return plan._certificate(
        plan.operation,
        agreement=agreement,
        keys=snapshot.moved_keys(plan.model),
        taking_back=_taking_back(plan.operation, done),
    )


def plan(operation: Callable[..., Certificate], model: nn.Module, *args: Any, **options: Any) -> Certificate:
    """What an operation would do to a model, without doing it: ``nk.plan(nk.convert_, model, to="group:32")``.

    Args:
        operation: :func:`normkit.accelerate_`, :func:`normkit.calibrate_`, :func:`normkit.convert_`,
            :func:`normkit.freeze_`, :func:`normkit.sync_` and the others of their kind.
        model: any module. Nothing about it changes.
        args: as the operation has them.
        options: as the operation has them.

    Returns:
        What would be changed, skipped and refused, as a table. The same as ``operation(model, ..., dry_run=True)``.

    Raises:
        TypeError: no operation on a model. Whatever the operation raises.

    >>> import torch, normkit as nk
    >>> print(nk.plan(nk.freeze_, torch.nn.Sequential(torch.nn.BatchNorm2d(8))).verdict)
    freeze_ (planned): 1 x BatchNorm2d becomes normkit's, 1 x BatchNorm2d frozen.
    """
    if not callable(operation) or "dry_run" not in inspect.signature(operation).parameters:
        raise TypeError(
            f"plan: {getattr(operation, '__name__', operation)!r} is no operation on a model.\n"
            "  give one whose name ends in _, as nk.plan(nk.convert_, model, to='group:32')"
        )
    return operation(model, *args, dry_run=True, **options)


def _taking_back(operation: str, done: Sequence[Step]) -> Callable[[], None]:
    remaining = list(done)

    def take_back() -> None:
        if not remaining:
            raise RuntimeError(f"{operation}: it was already taken back")
        against = [
            f"{step.prescription.module or '(the model)'}: {reason}"
            for step in remaining
            for reason in step.edit.objections()
        ]
        if against:
            raise RuntimeError(
                "\n".join([f"{operation}: cannot be taken back any more; nothing was changed.", *_indented(against)])
            )
        while remaining:
            remaining.pop().edit.revert()

    return take_back


def _failed(plan: Plan, sentences: list[str]) -> str:
    first = f"{plan.operation}: the result is not what was planned; the model is as it was."
    return "\n".join([first, *_indented(sentences), "  leave modules out with filter_fn= to find the one; report it"])


def _indented(sentences: list[str]) -> list[str]:
    return [f"  {sentence}" for sentence in sentences]


def _moved(training: bool, error: float, limit: float) -> str:
    mode = "training" if training else "evaluation"
    return f"on the probe batch the outputs in {mode} moved by {error:.1e} of their greatest value; limit {limit:.1e}"
