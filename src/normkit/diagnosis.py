"""nk.diagnose: measure a model, ask every rule, and say what is wrong, how that is known, and what to do."""

from __future__ import annotations

import contextlib
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import normkit
from normkit.finding_words import glossary, lines, plain, several
from normkit.integrations.exported_program import layered
from normkit.measure import QUANTITIES, Collection, packed
from normkit.measure.collect import numbers
from normkit.measure.neighbours import GRAPH, read_neighbours
from normkit.measure.structure import OF_OPTIMIZER, norms_in, read_structure
from normkit.measure.untouched import copied, in_mode, original, untouched
from normkit.rules import RULES
from normkit.rules.judge import chosen, judge
from normkit.surgery.batches import arguments
from normkit.surgery.batches import call as run_batch
from normkit.vocabulary.certificate import Certificate
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import SEVERITIES, Finding, Severity
from normkit.vocabulary.prescription import Prescription, Safety
from normkit.vocabulary.quantity import Stage
from normkit.vocabulary.reading import Reading
from normkit.vocabulary.record import encode, write_atomically

SCHEMA = 1
Names = Sequence[str] | str | None

TAKES: dict[Stage, str] = {
    "model": "the model itself",
    "batch": "a batch: nk.diagnose(model, batch)",
    "gradients": "a loss: nk.diagnose(model, batch, loss_fn)",
    "run": "a watched run: nk.watch(model, optimizer)",
    "probe": "a probe that is asked for by name",
}
"""What has to be given so that a stage is measured."""
_OPTIMIZER = "the optimizer: nk.diagnose(model, optimizer=optimizer)"
_ALLOWED: dict[Safety, tuple[Safety, ...]] = {
    "identical": ("identical",),
    "train_identical": ("identical", "train_identical"),
    "eval_identical": ("identical", "eval_identical"),
    "retrain": ("identical", "train_identical", "eval_identical", "retrain"),
}
_TOO_FEW = "more than 1 value per channel"  # torch's words


class DiagnosisError(RuntimeError):
    """What :meth:`Diagnosis.raise_if` raises; ``diagnosis`` has the findings."""

    def __init__(self, diagnosis: Diagnosis, message: str) -> None:
        super().__init__(message)
        self.diagnosis = diagnosis


@dataclass(frozen=True)
class Subject:
    """What was diagnosed, so that it can be treated and diagnosed again."""

    model: nn.Module
    batch: Any = None
    loss_fn: Callable[..., Any] | None = None
    optimizer: torch.optim.Optimizer | None = None
    select: Names = None
    ignore: Names = None
    call: Callable[[nn.Module, Any], Any] | None = None


@dataclass(frozen=True)
class Diagnosis:
    """Findings, worst first, and the readings they rest on. Its ``repr`` is the report."""

    findings: tuple[Finding, ...]
    readings: tuple[Reading, ...] = ()
    not_asked: Mapping[str, str] = field(default_factory=dict)
    """Rules that had nothing to go by, and what they would need."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """``class``, number of ``parameters``, number of ``norms``."""
    run: Mapping[str, Any] | None = None
    """What is known of a watched run; ``None``: the model alone was diagnosed."""
    certificates: tuple[Certificate, ...] = ()
    """What :meth:`apply_` has done."""
    subject: Subject | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of_readings(
        cls,
        readings: Iterable[Reading],
        model: Mapping[str, Any],
        *,
        lacking: Mapping[str, str] | None = None,
        run: Mapping[str, Any] | None = None,
        select: Names = None,
        ignore: Names = None,
    ) -> Diagnosis:
        """Ask the rules about readings, wherever they come from.

        Args:
            readings: of one model or of one run.
            model: facts about it, see :attr:`model`.
            lacking: quantities that were not measured, with what that takes; default: all that no reading is of.
            run: facts about a run.
            select: names or patterns of rules; default all.
            ignore: names or patterns of rules that are not asked.
        """
        evidence = Evidence(readings)
        if lacking is None:
            lacking = {need: "readings of it" for rule in RULES.values() for need in rule.needs}
        findings, not_asked = judge(chosen(RULES.values(), select, ignore), evidence, lacking)
        return cls(findings, evidence.readings, not_asked, dict(model), run)

    @property
    def counts(self) -> dict[str, int]:
        """How many findings there are of each severity."""
        found = Counter(finding.severity for finding in self.findings)
        return {severity: found[severity] for severity in SEVERITIES}

    @property
    def verdict(self) -> str:
        """The whole in one sentence."""
        told = [several(number, word) for word, number in self.counts.items() if number]
        if not told:
            return f"nothing wrong was found{self._unasked}"
        worst = self.findings[0]
        return f"{' and '.join([', '.join(told[:-1]), told[-1]] if len(told) > 1 else told)}: {worst.claim}"

    @property
    def _unasked(self) -> str:
        return f"; {several(len(self.not_asked), 'rule')} had nothing to go by" if self.not_asked else ""

    def raise_if(self, severity: Severity = "error") -> None:
        """Raise where something is at least this severe: the line for a test or a training script.

        Args:
            severity: ``"error"``, ``"warning"`` or ``"note"``.

        Raises:
            DiagnosisError: there is such a finding; the message is the report.
            ValueError: no such severity.
        """
        if severity not in SEVERITIES:
            raise ValueError(f"severity {severity!r} is unknown.\n  choose from: {', '.join(SEVERITIES)}")
        if any(self.counts[one] for one in SEVERITIES[: SEVERITIES.index(severity) + 1]):
            raise DiagnosisError(self, repr(self))

    def __repr__(self) -> str:
        return "\n".join([self.verdict, *(line for finding in self.findings for line in lines(finding)), *self._rest()])

    def _rest(self) -> list[str]:
        done = [f"  done: {certificate.verdict}" for certificate in self.certificates]
        if not self.not_asked:
            return done
        reasons: dict[str, list[str]] = {}
        for rule, reason in self.not_asked.items():
            reasons.setdefault(reason.partition("it takes ")[2] or reason, []).append(rule)
        return [*done, *(f"  not asked, wants {what}: {', '.join(rules)}" for what, rules in reasons.items())]

    def to_json(self) -> dict[str, Any]:
        """The same as plain data; non-finite numbers are the words "nan", "inf" and "-inf"."""
        return encode(
            {
                "schema": SCHEMA,
                "verdict": self.verdict,
                "counts": self.counts,
                "model": dict(self.model),
                "findings": [plain(finding) for finding in self.findings],
                "readings": [asdict(reading) for reading in self.readings],
                "quantities": glossary({reading.quantity for reading in self.readings}),
                "not_asked": dict(self.not_asked),
                "certificates": [certificate.to_json() for certificate in self.certificates],
                "environment": {
                    "normkit": normkit.__version__,
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                },
                "run": None if self.run is None else dict(self.run),
            }
        )

    def to_html(self, path: str | Path) -> Path:
        """Write the report as one page that needs no network and no script; returns where it is."""
        from normkit.report.diagnosis_page import page

        place = Path(path)
        write_atomically(place, page(self.to_json()).encode())
        return place

    def _repr_html_(self) -> str:
        """The page, as notebooks show it."""
        from normkit.report.diagnosis_page import page

        return page(self.to_json())

    def apply_(self, safety: Safety = "identical", **given: Any) -> Diagnosis:
        """Treat the model: carry the first prescription of each finding out that is this safe, and diagnose again.

        Args:
            safety: how much may change: ``"identical"`` (nothing that the model computes), ``"train_identical"``,
                ``"eval_identical"``, or ``"retrain"`` (everything). What the others would do is in the report; try
                it as an arm of ``normkit compare``.
            given: what the operations need beside the model, as ``loader=`` for ``nk.calibrate_``.

        Returns:
            The diagnosis of the treated model; ``certificates`` says what was done, and can take it back. A
            prescription that needs something that was not given, or that a person has to carry out, stays in it.

        Raises:
            RuntimeError: this diagnosis has no model (it was read from a run).
            Exception: whatever an operation raises; the model is then as it was.
        """
        if self.subject is None:
            raise RuntimeError(
                "apply_: this diagnosis has no model at hand; call nk.diagnose(model, ...) and treat that"
            )
        from normkit.surgery.carry_out import carry_out, lacks

        subject = self.subject
        at_hand = {"optimizer": subject.optimizer, "example_inputs": _inputs(subject), **given}
        certificates = carry_out(
            subject.model,
            [p for p in self._first(safety) if not lacks(p, at_hand)],
            given={name: value for name, value in at_hand.items() if value is not None},
        )
        again = diagnose(**{name: getattr(subject, name) for name in Subject.__dataclass_fields__})
        return replace(again, certificates=certificates)

    def _first(self, safety: Safety) -> list[Prescription]:
        """Of each finding, for each place, the best prescription that may be carried out."""
        if safety not in _ALLOWED:
            raise ValueError(f"safety {safety!r} is unknown.\n  choose from: {', '.join(_ALLOWED)}")
        found: dict[tuple[str, str], Prescription] = {}
        for finding in self.findings:
            for prescription in finding.prescriptions:
                if prescription.operation and prescription.safety in _ALLOWED[safety]:
                    found.setdefault((finding.rule, prescription.module), prescription)
        return list(found.values())


def diagnose(
    model: nn.Module | torch.export.ExportedProgram,
    batch: Any = None,
    loss_fn: Callable[..., Any] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    select: Names = None,
    ignore: Names = None,
    call: Callable[[nn.Module, Any], Any] | None = None,
) -> Diagnosis:
    """Say what is wrong with the normalization of a model, by what number that is known, and what to do about it.

    What is given decides what is asked. The model alone: how its norms are set. With ``batch``: what they do to data,
    and whether training and evaluation agree. With ``loss_fn``: gradients. With ``optimizer``: decay, and what it
    trains. Nothing about the model changes: buffers, gradients, modes, hooks and the random state are as before.

    Args:
        model: any module; of one that is compiled or wrapped in DistributedDataParallel, the model inside. Or a program
            of ``torch.export``.
        batch: what a loader gives: a tensor, ``(input, target)``, or a dict, of which the model gets the keys that its
            forward has. An input may itself be a tuple of positional or a dict of keyword arguments.
        loss_fn: ``(output, target)`` to a number; of a batch that is a dict or a tensor the target is the batch, as in
            ``lambda output, batch: output.loss``.
        optimizer: what trains the model.
        select: names of rules, or patterns as ``"statistics_*"``; default all.
        ignore: names or patterns of rules that are not asked.
        call: ``(model, batch)`` runs the model, where it is called in another way.

    Returns:
        A :class:`Diagnosis`: ``print`` it, ``.to_html("report.html")``, ``.raise_if("error")``, ``.apply_()``.

    Raises:
        ValueError: a name that is no rule's; a batch that the model does not take.

    >>> import torch, normkit as nk
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8, track_running_stats=False))
    >>> print(nk.diagnose(model, select="no_running_statistics").verdict)
    1 warning: 1 batch norm has no running statistics (1): what a sample gives depends on the others in its batch

    When not to use it: as a proof that training will go well. A rule says what it found, not that there is nothing.
    """
    model = original(layered(model))
    chosen(RULES.values(), select, ignore)  # a wrong name is said before minutes are spent
    refused: list[Reading] = []
    try:
        neighbours, followed = read_neighbours(model, batch, call)
        measured = numbers(model, batch, loss_fn=loss_fn, optimizer=optimizer, call=call)
    except Exception as error:
        if _TOO_FEW not in str(error):
            error.add_note("this is what the model, or the loss, raises on the batch that was given")
            raise
        refused = _up_to_refusal(model, batch, call)
        (neighbours, followed), measured = read_neighbours(model), numbers(model, optimizer=optimizer)
    readings = [*read_structure(model, optimizer), *neighbours, *measured, *refused]
    given = batch is not None and not refused
    taken = {"model", *(["batch"] if given else []), *(["gradients"] if given and loss_fn is not None else [])}
    lacking = {name: TAKES[quantity.stage] for name, quantity in QUANTITIES.items() if quantity.stage not in taken}
    lacking |= {need: TAKES["run"] for rule in RULES.values() for need in rule.needs if need not in QUANTITIES}
    if optimizer is None:
        lacking |= dict.fromkeys(OF_OPTIMIZER, _OPTIMIZER)
    if not followed:
        lacking |= {quantity.name: TAKES["batch"] for quantity in GRAPH}
    facts = {
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "norms": sum(1 for _ in norms_in(model)),
    }
    found = Diagnosis.of_readings(readings, facts, lacking=lacking, select=select, ignore=ignore)
    return replace(found, subject=Subject(model, batch, loss_fn, optimizer, select, ignore, call))


def _up_to_refusal(model: nn.Module, batch: Any, call: Any) -> list[Reading]:
    """How many values each norm is given, as far as the first that refuses so few."""
    with (
        untouched(model),
        in_mode(model, None),
        torch.no_grad(),
        Collection(model, {"values_per_channel"}) as collection,
    ):
        with contextlib.suppress(ValueError):
            (call or run_batch)(model, copied(batch))
        return packed(collection.pending())


def _inputs(subject: Subject) -> Any:
    """What surgery compares the model on, before and after: the batch, as positional or as keyword arguments."""
    if subject.batch is None or subject.call is not None:
        return None
    args, kwargs = arguments(subject.model, subject.batch)
    return args or kwargs
