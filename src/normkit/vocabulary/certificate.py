"""Certificate: what an operation on a model did, what it left alone and why, and how far the outputs moved."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from normkit.vocabulary.prescription import Prescription
from normkit.vocabulary.reading import Reading

_MODES = {False: "evaluation", True: "training"}

_FEW = 3  # keys that repr names
_LIMIT = 30  # rows of each kind that repr shows; to_json has all


def _what(prescription: Prescription) -> str:
    detail = f": {prescription.detail}" if prescription.detail else ""
    return f"{prescription.action}{detail} ({prescription.safety})"


@dataclass(frozen=True, slots=True)
class Untouched:
    """A module that an operation left as it was."""

    module: str
    reason: str
    """A sentence: why, and where possible what to do."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far a model's outputs (and buffers) on the probe batch moved, in one mode."""

    training: bool
    error: float
    """Greatest difference, divided by the greatest value of the same tensor."""
    limit: float


@dataclass(frozen=True, slots=True)
class Keys:
    """How the keys of the ``state_dict`` have changed; all others are those of before, in their order."""

    removed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()

    def words(self) -> Iterator[str]:
        for word, keys in (("without", self.removed), ("with", self.added)):
            if keys:
                more = f" ... ({len(keys)} in all)" if len(keys) > _FEW else ""
                yield f"the state_dict is {word} {', '.join(keys[:_FEW])}{more}"


@dataclass(frozen=True)
class Certificate:
    """The account of one operation. Its ``repr`` is a table; :meth:`undo` takes the operation back."""

    operation: str
    changed: tuple[Prescription, ...] = ()
    skipped: tuple[Untouched, ...] = ()
    """Nothing to do there, or deliberately left out."""
    refused: tuple[Untouched, ...] = ()
    """Something could be gained there, but not safely."""
    agreement: tuple[Agreement, ...] = ()
    """Empty: no probe batch was given, and nothing was measured."""
    readings: tuple[Reading, ...] = ()
    """What was measured on the way, layer by layer."""
    notes: tuple[str, ...] = ()
    """Sentences about the whole."""
    keys: Keys = field(default_factory=Keys)
    taking_back: Callable[[], None] | None = field(default=None, repr=False, compare=False)

    def undo(self) -> None:
        """Take the operation back: the model is again what it was, with the values that it has now.

        Raises:
            RuntimeError: it was already taken back, or the model has been changed in the same places since.
        """
        if self.taking_back is None:
            raise RuntimeError(f"{self.operation}: there is nothing to take back, because nothing was changed")
        self.taking_back()

    @property
    def verdict(self) -> str:
        """The whole in one sentence."""
        counts = Counter(prescription.action for prescription in self.changed)
        done = ", ".join(f"{count} x {action}" for action, count in counts.items()) or "nothing was changed"
        left = [f"{len(rows)} {word}" for word, rows in (("skipped", self.skipped), ("refused", self.refused)) if rows]
        return f"{self.operation}: {done}{'; ' if left else ''}{', '.join(left)}."

    def _measured(self) -> Iterator[str]:
        yield from self.notes
        yield from self.keys.words()
        for row in self.agreement:
            yield f"greatest error in {_MODES[row.training]}: {row.error:.1e} (limit {row.limit:.1e})"
        if not self.agreement and not self.notes:
            yield "greatest error: not measured; give example_inputs= and it will be"

    def _rows(self) -> Iterator[tuple[str, str, str]]:
        for prescription in self.changed:
            yield "changed", prescription.module or "(the model)", _what(prescription)
        for word, untouched in (("refused", self.refused), ("skipped", self.skipped)):
            for row in untouched:
                yield word, row.module or "(the model)", row.reason

    def __repr__(self) -> str:
        rows = list(self._rows())
        shown: list[tuple[str, str, str]] = []
        for word in ("changed", "refused", "skipped"):
            same = [row for row in rows if row[0] == word]
            shown += same[:_LIMIT]
            if len(same) > _LIMIT:
                shown.append((word, "...", f"and {len(same) - _LIMIT} more; to_json() has them all"))
        width = max((len(row[1]) for row in shown), default=0)
        table = [f"  {word}  {module:<{width}}  {text}" for word, module, text in shown]
        return "\n".join([self.verdict, *(f"  {line}" for line in self._measured()), *table])

    def _repr_html_(self) -> str:
        """The table, as notebooks show it."""
        cell = lambda text: f"<td style='text-align:left'>{html.escape(text)}</td>"
        rows = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in self._rows())
        measured = "<br>".join(map(html.escape, self._measured()))
        return (
            f"<p><b>{html.escape(self.verdict)}</b><br>{measured}</p>"
            f"<table><tr><th></th><th>module</th><th>what</th></tr>{rows}</table>"
        )

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        untouched = lambda rows: [{"module": row.module, "reason": row.reason} for row in rows]
        return {
            "operation": self.operation,
            "verdict": self.verdict,
            "changed": [
                {
                    "module": p.module,
                    "action": p.action,
                    "detail": p.detail,
                    "reason": p.reason,
                    "safety": p.safety,
                }
                for p in self.changed
            ],
            "skipped": untouched(self.skipped),
            "refused": untouched(self.refused),
            "agreement": [{"training": row.training, "error": row.error, "limit": row.limit} for row in self.agreement],
            "readings": [asdict(reading) for reading in self.readings],
            "notes": list(self.notes),
            "keys": {"removed": list(self.keys.removed), "added": list(self.keys.added)},
        }
