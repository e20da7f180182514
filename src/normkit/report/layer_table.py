"""The layer table: one row per norm layer (and per activation), one column per quantity that was read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from normkit.report.document import Block, Folded, Table, Text
from normkit.report.finding_parts import value
from normkit.vocabulary.evidence import Evidence

SHOWN = 80
"""Rows; a deeper network folds the rest away."""


@dataclass(frozen=True)
class Column:
    """What a cell shows of a module; empty: nothing was read."""

    header: str
    cell: Callable[[Evidence, str], str]
    numeric: bool = True


def _of(quantity: str, header: str, scale: float = 1.0, suffix: str = "") -> Column:
    def cell(evidence: Evidence, module: str) -> str:
        number = evidence.number(quantity, module)
        return "" if number is None else value(scale * number) + suffix

    return Column(header, cell)


def _word(quantity: str, header: str) -> Column:
    return Column(header, lambda evidence, module: evidence.word(quantity, module), numeric=False)


def _of_weight(quantity: str, header: str) -> Column:
    """Of the module's own weight, under whose name it was read."""

    def cell(evidence: Evidence, module: str) -> str:
        number = evidence.number(quantity, f"{module}.weight")
        return "" if number is None else value(number)

    return Column(header, cell)


def _range(evidence: Evidence, module: str) -> str:
    ends = [evidence.number(quantity, module) for quantity in ("scale_least", "scale_greatest")]
    return "" if None in ends else f"{value(ends[0])} to {value(ends[1])}"


NORMS = (
    _word("kind", "type"),
    _of("values_per_channel", "values per channel"),
    _of("batch_noise", "batch noise, σ"),
    _of("mean_drift", "mean drift, σ"),
    _of("variance_drift", "variance drift, |log|"),
    _of("constant_share", "constant channels", 100, " %"),
    Column("|γ|", _range),
    _of("activation_std", "output σ"),
    _of("least_variance_over_eps", "least variance / ε"),
    _of("arithmetic_error", "off float32", 100, " %"),
    _of("stable_rank", "stable rank"),
    _of_weight("gradient_norm", "gradient norm"),
    _of_weight("update_to_weight", "update : weight"),
    _of("running_nonfinite", "not finite"),
)
ACTIVATIONS = (
    _of("activation_mean", "mean"),
    _of("activation_std", "σ"),
    _of("activation_p15", "15 %"),
    _of("activation_p50", "50 %"),
    _of("activation_p85", "85 %"),
    _of("dead_share", "dead", 100, " %"),
    _of("saturated_share", "saturated", 100, " %"),
    _of("stable_rank", "stable rank"),
    _of("orthogonality_gap", "orthogonality gap"),
)
OF_A_NORM = ("values_per_channel", "mean_drift", "scale_greatest", "running_nonfinite")


def layers(evidence: Evidence, findings: Sequence[dict[str, Any]], until: int | None = None) -> list[Block]:
    """Norm layers, then activations; a column that nothing fills is left out.

    ``until``: the step of the first NaN; the table shows what there was before it.
    """
    when = "the last value of each"
    if until is not None:
        evidence = Evidence(r for r in evidence.readings if r.step is None or r.step < until)
        when += f" before step {until}, where the first NaN is"
    norms = _places(evidence, OF_A_NORM)
    activations = [name for name in _places(evidence, ("dead_share", "activation_std")) if name not in norms]
    blocks: list[Block] = []
    for what, names, columns in (("Norm layers", norms, NORMS), ("Activations", activations, ACTIVATIONS)):
        if names:
            blocks += _table(f"{what}: {when}.", names, columns, evidence, findings)
    return blocks


def _places(evidence: Evidence, quantities: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(module for quantity in quantities for module in evidence.modules(quantity) if module))


def _table(
    caption: str, names: list[str], columns: Sequence[Column], evidence: Evidence, findings: Sequence[dict[str, Any]]
) -> list[Block]:
    used = [column for column in columns if any(column.cell(evidence, name) for name in names)]
    words = [column for column in used if not column.numeric]
    numbers = [column for column in used if column.numeric]
    header = ["layer", *(column.header for column in words), "findings", *(column.header for column in numbers)]
    cells = lambda columns, name: [column.cell(evidence, name) for column in columns]
    rows = [[name, *cells(words, name), _told(findings, name), *cells(numbers, name)] for name in names]
    worst = [_worst(findings, name) for name in names]
    numeric = frozenset(range(len(words) + 2, len(header)))
    first = Table(header, rows[:SHOWN], caption, numeric, worst[:SHOWN])
    if len(rows) <= SHOWN:
        return [first]
    rest = Table(header, rows[SHOWN:], "", numeric, worst[SHOWN:])
    return [first, Folded(f"{len(rows) - SHOWN} more layers", [rest])]


def _at(findings: Sequence[dict[str, Any]], module: str) -> list[dict[str, Any]]:
    return [f for f in findings if any(m == module or m.startswith(f"{module}.") for m in f.get("modules", ()))]


def _told(findings: Sequence[dict[str, Any]], module: str) -> str:
    """In words too: colour alone tells some readers nothing."""
    counts = Counter(finding["severity"] for finding in _at(findings, module))
    return ", ".join(f"{number} {kind}{'' if number == 1 else 's'}" for kind, number in counts.items())


def _worst(findings: Sequence[dict[str, Any]], module: str) -> str | None:
    found = _at(findings, module)
    return found[0]["severity"] if found else None


EMPTY = Text("No norm layer or activation was read.", "note")
