"""Every op of the benchmark on a small shape, and the least effort that still gives numbers."""

from __future__ import annotations

from dataclasses import replace

from normkit.bench.cases import CASES, Case
from normkit.bench.cell import Effort
from normkit.bench.clock import LEAST_ROUNDS
from normkit.dispatch import BACKENDS

SMALL = {  # a shape per number of axes: off the powers of two, several pieces for the oracle
    2: (18, 40),
    3: (5, 7, 40),
    4: (3, 64, 5, 7),
    5: (2, 64, 3, 4, 5),
}
EVERY_OP = [
    replace(case, shape=SMALL[len(case.shape)])
    for case in {(case.op, len(case.shape)): case for case in CASES if case.level == "default"}.values()
]
BRIEF = Effort(
    rounds=LEAST_ROUNDS, seconds=0.0, wanted=("torch out of place", "normkit", *(f"normkit:{b}" for b in BACKENDS))
)


def name_of(case: Case) -> str:
    return f"{case.op}-{len(case.shape)}d"
