"""What the verbs that operate on a model share: its words, the model it names, and where the result goes."""

from __future__ import annotations

import contextlib
import fnmatch
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normkit import imported
from normkit.cli import checkpoints, data
from normkit.cli.errors import UserError
from normkit.cli.output import show, show_json
from normkit.surgery import batches
from normkit.vocabulary.certificate import Certificate

Several = tyro.conf.UseAppendAction
Filter = Callable[[nn.Module, str], bool]


@dataclass
class Operation:
    """The words that every such verb takes."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """What builds the model: package.module:function or file.py:function, called without arguments."""
    checkpoint: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Its weights: .safetensors, or .pt with a state_dict in it. Default: as the function gives them."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = None
    """Where the state_dict of the result goes (.safetensors or .pt); the certificate goes beside it."""
    data: Annotated[str | None, tyro.conf.arg(metavar="DATA")] = None
    """Batches: .npz or .pt with the samples along the first axis, or file.py:function that yields them."""
    batch_size: int = 32
    """Samples in a batch, where the data are a file."""
    only: Annotated[list[str], tyro.conf.arg(metavar="PATTERN"), Several] = field(default_factory=list)
    """Only layers whose name fits, as layer1.*; may be repeated."""
    leave_out: Annotated[list[str], tyro.conf.arg(metavar="PATTERN"), Several] = field(default_factory=list)
    """Not the layers whose name fits; may be repeated."""
    device: str = "cpu"
    """Where to compute: cpu, cuda. Files are the same."""
    dry_run: bool = False
    """Say what would be done, and write nothing."""
    force: bool = False
    """Overwrite the result of before."""
    json: bool = False
    """Print the certificate as JSON, and nothing else."""

    @property
    def filter_fn(self) -> Filter | None:
        """Which layers are meant; ``None``: all."""
        if not self.only and not self.leave_out:
            return None
        fits = lambda name, patterns: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        return lambda module, name: (not self.only or fits(name, self.only)) and not fits(name, self.leave_out)

    def batches(self) -> Iterable[Any] | None:
        """What ``--data`` gives."""
        return None if self.data is None else data.batches(self.data, self.batch_size)


@dataclass(frozen=True)
class Opened:
    """The model that was named, with its weights."""

    model: nn.Module
    aside: tuple[str, ...] = ()
    """What else was in the checkpoint."""


def opened(asked: Operation) -> Opened:
    """The model, with its weights, once it is clear that the result can be written.

    Raises:
        UserError: what was typed gives none, or the result would have no place.
    """
    if asked.out is None and not asked.dry_run:
        raise UserError("-o FILE is missing: where does the result go?\n  or --dry-run, which writes nothing")
    if asked.out is not None:
        checkpoints.may_write(asked.out, asked.force or asked.dry_run)
    model = built(asked.model)
    aside: list[str] = []
    if asked.checkpoint is not None:
        state, aside = checkpoints.read(asked.checkpoint)
        checkpoints.fill(model, state, asked.checkpoint)
    try:
        return Opened(model.to(asked.device), tuple(aside))
    except (RuntimeError, AssertionError) as error:  # AssertionError: this torch was built without CUDA
        raise UserError(f"--device {asked.device} cannot be used here.\n  {str(error).splitlines()[0]}") from error


def built(named: str) -> nn.Module:
    """The model that a person names.

    Raises:
        UserError: nothing of that name, or it builds none.
    """
    if ":" not in named:
        raise UserError(f"MODEL {named!r}: write file.py:function or package.module:function")
    try:
        function = imported.function(named)
    except ValueError as error:
        raise UserError(f"MODEL {named}: {error}") from error
    try:
        found = function()
    except Exception as error:
        first = f"MODEL {named}: raised {imported.describe(error)}"
        raise UserError(f"{first}\n  give a function without arguments that returns a model") from error
    if not isinstance(found, nn.Module):
        raise UserError(f"MODEL {named}: returned a {type(found).__name__}, and not a torch.nn.Module")
    return found


def example(asked: Operation, model: nn.Module) -> Any:
    """The first batch, as the model is called with it; ``None``: no data."""
    found = asked.batches()
    if found is None:
        return None
    first = next(iter(found), None)
    if first is None:
        raise UserError(f"--data {asked.data}: gives no batch")
    with told():
        args, kwargs = batches.arguments(model, first)
    there = lambda leaf: leaf.to(asked.device) if isinstance(leaf, Tensor) else leaf
    return pytree.tree_map(there, args or kwargs)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """What the library refuses is an answer to what was typed, with the notes that it has."""
    try:
        yield
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        notes = getattr(error, "__notes__", [])
        raise UserError("\n  ".join([str(error), *notes])) from error


def finish(
    asked: Operation,
    argv: Sequence[str],
    verb: str,
    certificate: Certificate,
    result: nn.Module,
    *,
    aside: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> int:
    """Write the result and say what was done; the exit status: 1 where something was refused."""
    written: list[str] = []
    if not asked.dry_run and asked.out is not None:
        checkpoints.write(asked.out, result.state_dict(), certificate.to_json())
        written = [f"state_dict: {asked.out}", f"certificate: {checkpoints.beside(asked.out)}"]
        written += [f"not carried over from {asked.checkpoint}: {', '.join(aside)}"] if aside else []
    if asked.json:
        out = None if asked.dry_run else str(asked.out)
        show_json({"answer": certificate.verdict, "out": out, **certificate.to_json()})
    else:
        answer, *table = repr(certificate).splitlines()
        parts = ["\n".join(lines) for lines in (table, written, notes) if lines]
        show(answer, *parts, then=_next(asked, verb, argv))
    return 1 if certificate.refused else 0


def _next(asked: Operation, verb: str, argv: Sequence[str]) -> str:
    words = [word for word in argv if word != "--dry-run"]
    if asked.dry_run:
        return shlex.join(["normkit", verb, *words, *([] if asked.out else ["-o", "out.safetensors"])])
    return "normkit fold --help" if verb == "calibrate" else "normkit list"
