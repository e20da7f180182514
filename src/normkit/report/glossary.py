"""The glossary of a diagnosis: every quantity that was read, by its own record, and the other words of the page."""

from __future__ import annotations

from normkit.report.document import Block, Folded, Items
from normkit.report.labels import sentence

TERMS = {
    "batch statistics": "The mean and variance of the batch itself, by which a batch norm normalises in training.",
    "error, warning, note": "Wrong results or a training that fails; accuracy or speed that is lost; good to know.",
    "running statistics": "The moving averages of mean and variance, by which a batch norm normalises in evaluation.",
    "sample": "A step at which numbers were read; between samples nothing is measured.",
    "train mode": "Batch norm by the batch, dropout at work: the model as it is while it learns.",
    "γ": "The scale of a norm: its weight.",
    "ε": "What a norm adds to the variance before it divides: its eps.",
    "σ": "A standard deviation: of the values themselves, or as the unit in which a distance is told.",
}
"""Words of the page that are no quantities."""


def glossary(quantities: dict[str, dict[str, str]]) -> list[Block]:
    """Words first, then quantities by name: one sentence, the formula, the unit, the paper."""
    blocks: list[Block] = [Folded("Words on this page", [Items([*TERMS.values()], [*TERMS])])]
    if quantities:
        told = [told_of(known) for known in quantities.values()]
        terms = [name.replace("_", " ") for name in quantities]
        blocks.append(Folded(f"{len(told)} quantities, and how each is computed", [Items(told, terms)]))
    return blocks


def told_of(known: dict[str, str]) -> str:
    """A quantity in a line."""
    formula = known["formula"] if known.get("means") else sentence(known["formula"])
    parts = [known.get("means", ""), f"Computed as {formula}." if known.get("means") else formula]
    parts += [_unit(known["unit"])] if known.get("unit") else []
    parts += [f"Source: {known['paper']}."] if known.get("paper") else []
    return " ".join(filter(None, parts))


def _unit(unit: str) -> str:
    """A unit, or what the numbers of a flag stand for."""
    return f"{unit.replace(':', ' is')}." if ":" in unit else f"Unit: {unit}."
