"""``normkit fold``: the norms of a checkpoint go into the layers beside them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

import normkit as nk
from normkit.cli import arguments
from normkit.cli.errors import UserError
from normkit.cli.operating import Operation, example, finish, opened, told

LOADING = "the folded weights fit the folded model: nk.fold(model, example_inputs).load_state_dict(...)"


@dataclass
class Fold(Operation):
    """Fold the norms of a checkpoint into the layers beside them, for evaluation."""

    shape: Annotated[str | None, tyro.conf.arg(metavar="N,C,...")] = None
    """Without --data: random inputs of this shape, as 2,3,224,224."""
    program: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the folded model as a torch.export program (.pt2), which runs without its code."""


def main(argv: list[str]) -> int:
    asked = arguments.parse(Fold, argv, "fold")
    if asked.program is not None and asked.program.exists() and not asked.force and not asked.dry_run:
        raise UserError(f"--program {asked.program} exists already; --force overwrites it, or name another")
    found = opened(asked)
    inputs = _inputs(asked, found.model)
    with told():
        if asked.dry_run:
            planned = nk.fold(found.model, inputs, filter_fn=asked.filter_fn, dry_run=True)
            return finish(asked, argv, "fold", planned, found.model)
        folded: Any = nk.fold(found.model, inputs, filter_fn=asked.filter_fn)
    notes = [LOADING]
    if asked.program is not None:
        _export(folded, inputs, asked.program)
        notes = [f"program: {asked.program} (torch.export.load)"]
    return finish(asked, argv, "fold", folded.certificate, folded, aside=found.aside, notes=notes)


def _inputs(asked: Fold, model: torch.nn.Module) -> Any:
    if (asked.data is None) == (asked.shape is None):
        raise UserError("give --data, whose first batch the model runs on, or --shape for random inputs; one of them")
    if asked.shape is None:
        return example(asked, model)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    drawn = torch.randn(arguments.shape(asked.shape), generator=torch.Generator().manual_seed(0))
    return (drawn.to(like.device, like.dtype),)


def _export(folded: torch.nn.Module, inputs: Any, path: Path) -> None:
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    part = path.with_name(f".{path.name}.part")
    try:
        with told(), torch.no_grad():
            torch.export.save(torch.export.export(folded, args, kwargs), part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
