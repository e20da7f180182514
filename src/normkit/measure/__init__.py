"""What normalization does inside a network, in numbers: quantities, and the one collection that reads them."""

from normkit.measure.collect import Collection, measure, packed
from normkit.measure.quantities import QUANTITIES

__all__ = ["QUANTITIES", "Collection", "measure", "packed"]
