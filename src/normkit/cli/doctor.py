"""``normkit doctor``: what is wrong with the normalization of a model or of a watched run, and what to do about it."""

from __future__ import annotations

import shlex
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional

from normkit import imported
from normkit.cli import arguments, checkpoints, data
from normkit.cli.errors import UserError, from_user
from normkit.cli.operating import built, told
from normkit.cli.output import show, show_json
from normkit.diagnosis import Diagnosis, diagnose
from normkit.integrations.exported_program import layered
from normkit.vocabulary.finding import SEVERITIES

Several = tyro.conf.UseAppendAction
BATCH = 32
PROGRAM = ".pt2"


@dataclass
class Doctor:
    """Say what is wrong with the normalization of a model or of a watched run, by which number, and what to do."""

    subject: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL|RUN_DIR")]
    """What builds the model: package.module:function or file.py:function, called without arguments. Or a program that
    torch.export has saved (.pt2), or the directory that nk.watch has written."""
    input: Annotated[str | None, tyro.conf.arg(metavar="C,H,W")] = None
    """Size of one sample: 3,224,224. The batch is then random, of mean 0 and deviation 1."""
    batch: int = BATCH
    """Samples in the batch."""
    data: Annotated[str | None, tyro.conf.arg(metavar="DATA")] = None
    """A real batch instead: .npz or .pt with the samples along the first axis, or file.py:function that yields them."""
    loss: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Of (output, target), for gradients: a function of torch.nn.functional (cross_entropy) or file.py:function."""
    optimizer: Annotated[str | None, tyro.conf.arg(metavar="FUNCTION")] = None
    """file.py:function that makes the optimizer out of the model."""
    checkpoint: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Weights: .safetensors, or .pt with a state_dict in it."""
    evaluate: Annotated[bool, tyro.conf.arg(name="eval")] = False
    """Look at the model in evaluation mode, as it would be deployed."""
    select: Annotated[list[str], tyro.conf.arg(metavar="RULE"), Several] = field(default_factory=list)
    """Only these rules; * stands for anything; may be repeated. Default: all."""
    ignore: Annotated[list[str], tyro.conf.arg(metavar="RULE"), Several] = field(default_factory=list)
    """Not these rules; may be repeated."""
    fail_on: Literal["error", "warn", "warning", "note", "never"] = "warning"
    """The exit status is 1 where there is a finding of this severity or a worse one."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FILE.html")] = None
    """Also write the report as one page."""
    json: bool = False
    """Print the report as JSON, and nothing else."""


def main(argv: Sequence[str]) -> int:
    asked = arguments.parse(Doctor, [*argv], "doctor")
    found = _of_run(asked) if Path(asked.subject).is_dir() else _of_model(asked)
    if asked.out is not None:
        with told():
            found.to_html(asked.out)
    if asked.json:
        show_json(found.to_json())
    else:
        answer, *findings = repr(found).splitlines()
        parts = ["\n".join(findings)] if findings else []
        parts += [f"page: {asked.out}"] if asked.out else []
        show(answer, *parts, then=_next(asked, argv, found))
    return int(_fails(asked, found))


def _of_run(asked: Doctor) -> Diagnosis:
    from normkit.watching.run import report_of_run

    for word in ("input", "data", "loss", "optimizer", "checkpoint"):
        if getattr(asked, word) is not None:
            raise UserError(f"--{word} goes with a MODEL; {asked.subject} is the directory of a run, which has its own")
    with from_user():
        return report_of_run(asked.subject, select=asked.select or None, ignore=asked.ignore or None)


def _of_model(asked: Doctor) -> Diagnosis:
    model = _program(asked) if asked.subject.endswith(PROGRAM) else built(asked.subject)
    if asked.checkpoint is not None:
        state, _ = checkpoints.read(asked.checkpoint)
        checkpoints.fill(model, state, asked.checkpoint)
    if asked.evaluate:
        model.eval()
    batch = _batch(asked)
    if asked.loss is not None and asked.data is None:
        raise UserError("--loss wants targets: give batches of (input, target) with --data")
    optimizer = None if asked.optimizer is None else _function("--optimizer", asked.optimizer)(model)
    with told():
        return diagnose(
            model,
            batch,
            None if asked.loss is None else _loss(asked.loss),
            optimizer,
            select=asked.select or None,
            ignore=asked.ignore or None,
        )


def _program(asked: Doctor) -> nn.Module:
    """An exported program as a model of layers."""
    for word, given in (("checkpoint", asked.checkpoint), ("optimizer", asked.optimizer), ("eval", asked.evaluate)):
        if given:
            raise UserError(
                f"--{word} goes with a function that builds the model; {asked.subject} is a program of torch.export, "
                "with its own weights and modes"
            )
    save = "  torch.export.save(program, 'net.pt2') writes one; or give file.py:function that builds the model"
    if not zipfile.is_zipfile(asked.subject):
        what = "is no program of torch.export" if Path(asked.subject).exists() else "is not there"
        raise UserError(f"MODEL {asked.subject}: {what}\n{save}")
    try:
        return layered(torch.export.load(asked.subject))
    except Exception as error:
        raise UserError(
            f"MODEL {asked.subject}: torch.export.load raised {imported.describe(error)}\n{save}"
        ) from error


def _batch(asked: Doctor) -> Any:
    if asked.data is not None:
        if asked.input is not None:
            raise UserError("--data and --input exclude each other: the batch is real or random")
        first = next(iter(data.batches(asked.data, asked.batch)), None)
        if first is None:
            raise UserError(f"--data {asked.data}: gives no batch")
        return first
    if asked.batch < 1:
        raise UserError(f"--batch {asked.batch}: a batch has at least one sample")
    if asked.input is None:
        return None
    torch.manual_seed(0)
    return torch.randn(asked.batch, *arguments.shape(asked.input, option="--input"))


def _loss(name: str) -> Callable[..., Tensor]:
    if ":" in name:
        return _function("--loss", name)
    found = getattr(functional, name, None)
    if not callable(found):
        raise UserError(f"--loss {name!r}: torch.nn.functional has no such function\n  or give file.py:function")
    return found


def _function(option: str, named: str) -> Callable[..., Any]:
    try:
        return imported.function(named)
    except ValueError as error:
        raise UserError(f"{option} {named}: {error}") from error


def _fails(asked: Doctor, found: Diagnosis) -> bool:
    if asked.fail_on == "never":
        return False
    least = "warning" if asked.fail_on == "warn" else asked.fail_on
    return any(found.counts[one] for one in SEVERITIES[: SEVERITIES.index(least) + 1])


def _next(asked: Doctor, argv: Sequence[str], found: Diagnosis) -> str:
    """The worst finding explained; without findings, what would tell more."""
    if found.findings:
        return f"normkit explain {found.findings[0].rule}"
    if found.run is None and asked.input is None and asked.data is None:
        return shlex.join(["normkit", "doctor", *argv, "--input", "3,224,224"])
    return "normkit list"
