"""``normkit freeze``: what freezing the norms of a model would touch, and that a checkpoint fits it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import normkit as nk
from normkit.cli import arguments
from normkit.cli.operating import Operation, example, finish, opened, told


@dataclass
class Freeze(Operation):
    """Freeze the layers with running statistics, and write a checkpoint that fits the frozen model."""

    what: Literal["all", "statistics", "affine"] = "all"
    """Running statistics, weight and bias, or both."""


def main(argv: list[str]) -> int:
    asked = arguments.parse(Freeze, argv, "freeze")
    found = opened(asked)
    statistics, affine = asked.what != "affine", asked.what != "statistics"
    inputs = example(asked, found.model)
    with told():
        certificate = nk.freeze_(
            found.model,
            statistics=statistics,
            affine=affine,
            filter_fn=asked.filter_fn,
            example_inputs=inputs,
            dry_run=asked.dry_run,
        )
    call = f"nk.freeze_(model, statistics={statistics}, affine={affine})"
    notes = [f"what is frozen stands in the model, not in a checkpoint: call {call} once the weights are loaded"]
    return finish(asked, argv, "freeze", certificate, found.model, aside=found.aside, notes=notes)
