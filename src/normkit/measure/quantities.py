"""Every quantity there is, by name: what it is, in which unit, by which formula, from which paper."""

from __future__ import annotations

from normkit.measure import (
    activations,
    evaluations,
    gradients,
    neighbours,
    precision,
    statistics,
    structure,
    theory_quantities,
    updates,
)
from normkit.vocabulary.quantity import Quantity

QUANTITIES: dict[str, Quantity] = {
    quantity.name: quantity
    for family in (
        structure,
        neighbours,
        statistics,
        precision,
        activations,
        evaluations,
        gradients,
        updates,
        theory_quantities,
    )
    for quantity in family.QUANTITIES
}
