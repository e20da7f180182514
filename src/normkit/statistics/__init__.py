"""Which statistics a batch norm uses: one file per policy, and the one place where running statistics move."""

from normkit.statistics.batch import Batch
from normkit.statistics.blend import Blend
from normkit.statistics.ghost import Ghost
from normkit.statistics.l1 import L1
from normkit.statistics.moving_average import MovingAverage, bind
from normkit.statistics.naming import named
from normkit.statistics.per_domain import PerDomain
from normkit.statistics.per_step import PerStep
from normkit.statistics.policy import Policy
from normkit.statistics.range import Range
from normkit.statistics.renorm import Renorm
from normkit.statistics.running import Running
from normkit.statistics.same_calls import same_calls
from normkit.statistics.synchronized import Synchronized
from normkit.statistics.taper import Taper
from normkit.statistics.virtual import Virtual

__all__ = [
    "L1",
    "Batch",
    "Blend",
    "Ghost",
    "MovingAverage",
    "PerDomain",
    "PerStep",
    "Policy",
    "Range",
    "Renorm",
    "Running",
    "Synchronized",
    "Taper",
    "Virtual",
    "bind",
    "named",
    "same_calls",
]
