"""``normkit convert``: the norms of a checkpoint become norms of another kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

import normkit as nk
from normkit.cli import arguments
from normkit.cli.operating import Operation, finish, opened, told


@dataclass
class Convert(Operation):
    """Turn the norms of a checkpoint into norms of another kind; with --data, matched to what the old ones give."""

    to: Annotated[str, tyro.conf.arg(metavar="NORM")] = "group:32"
    """As `normkit list` names them: group:32, group:auto, layer, rms, instance, dyt, none; or frozen_batch."""


def main(argv: list[str]) -> int:
    asked = arguments.parse(Convert, argv, "convert")
    match, found = asked.batches(), opened(asked)
    with told():
        certificate = nk.convert_(
            found.model, to=asked.to, match=match, filter_fn=asked.filter_fn, dry_run=asked.dry_run
        )
    notes = [] if match is not None else ["without --data nothing was matched: scales and shifts are those of before"]
    notes.append(f"the weights fit the converted model: nk.convert_(model, to={asked.to!r}), then load_state_dict")
    return finish(asked, argv, "convert", certificate, found.model, aside=found.aside, notes=notes)
