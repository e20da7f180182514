"""Which statistics a batch norm uses: one file per policy, and the one place where running statistics move."""

from normkit.statistics.batch import Batch
from normkit.statistics.ghost import Ghost
from normkit.statistics.policy import Policy
from normkit.statistics.renorm import Renorm
from normkit.statistics.running import Running

__all__ = ["Batch", "Ghost", "Policy", "Renorm", "Running"]
