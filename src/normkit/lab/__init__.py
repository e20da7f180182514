"""Experiments: train real networks with and without normalization, and let the runs answer.

result = normkit.lab.compare("digits", norms="none,batch", budget="quick")
print(result.answer, result.page)
"""

from normkit.lab.arm import Arm
from normkit.lab.comparison import Result, compare
from normkit.lab.data import Data
from normkit.lab.errors import LabError
from normkit.lab.experiment import ACCURACY, ADAM_RATES, SGD_RATES, Experiment, Metric
from normkit.lab.step import Step
from normkit.lab.tasks import TASKS

__all__ = [
    "ACCURACY",
    "ADAM_RATES",
    "SGD_RATES",
    "TASKS",
    "Arm",
    "Data",
    "Experiment",
    "LabError",
    "Metric",
    "Result",
    "Step",
    "compare",
]
