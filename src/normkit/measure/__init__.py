"""What normalization does inside a network, in numbers: quantities, the one collection that reads them, and probes."""

from normkit.measure.collect import Collection, measure, packed
from normkit.measure.quantities import QUANTITIES
from normkit.measure.theory import activation_drift, explosion_rate, internal_covariate_shift, landscape

__all__ = [
    "QUANTITIES",
    "Collection",
    "activation_drift",
    "explosion_rate",
    "internal_covariate_shift",
    "landscape",
    "measure",
    "packed",
]
