"""Every quantity there is, by name: what it is, in which unit, by which formula, from which paper."""

from __future__ import annotations

from normkit.measure import activations, evaluations, gradients, statistics
from normkit.vocabulary.quantity import Quantity

QUANTITIES: dict[str, Quantity] = {
    quantity.name: quantity
    for family in (activations, statistics, evaluations, gradients)
    for quantity in family.QUANTITIES
}
