"""Every quantity there is, by name: what it is, in which unit, by which formula, from which paper."""

from __future__ import annotations

from normkit.measure import (
    activations,
    evaluations,
    gradients,
    neighbours,
    statistics,
    structure,
    theory_quantities,
    updates,
)
from normkit.vocabulary.quantity import Quantity

QUANTITIES: dict[str, Quantity] = {
    quantity.name: quantity
    for family in (structure, neighbours, statistics, activations, evaluations, gradients, updates, theory_quantities)
    for quantity in family.QUANTITIES
}
