"""``normkit sync``: which batch norms of a model can pool their batches over processes, and that a checkpoint fits."""

from __future__ import annotations

from dataclasses import dataclass

import normkit as nk
from normkit.cli import arguments
from normkit.cli.operating import Operation, example, finish, opened, told


@dataclass
class Sync(Operation):
    """Let the batch norms pool the batches of all processes, and write a checkpoint that fits that model."""

    back: bool = False
    """The other way: batch norms of their own process again, as the model was before."""


def main(argv: list[str]) -> int:
    asked = arguments.parse(Sync, argv, "sync")
    found = opened(asked)
    inputs = example(asked, found.model)
    operation = nk.unsync_ if asked.back else nk.sync_
    with told():
        certificate = operation(found.model, filter_fn=asked.filter_fn, example_inputs=inputs, dry_run=asked.dry_run)
    call = f"nk.{operation.__name__}(model)"
    notes = [f"what is synchronised stands in the model, not in a checkpoint: call {call} in every process"]
    return finish(asked, argv, "sync", certificate, found.model, aside=found.aside, notes=notes)
