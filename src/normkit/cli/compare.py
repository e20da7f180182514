"""``normkit compare``: train real networks with and without normalization, and say which is better."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import tyro

from normkit import imported
from normkit.cli import arguments
from normkit.cli.errors import UserError, from_user, require
from normkit.cli.output import show, show_json
from normkit.cli.progress import watching
from normkit.cli.report import show_result, terminal_table
from normkit.lab.comparison import Result, compare
from normkit.lab.demonstrations import DEMONSTRATIONS
from normkit.lab.errors import LabError
from normkit.lab.knob import parse_value
from normkit.vocabulary.record import encode


@dataclass
class Compare:
    """Train a network with and without normalization, each arm at its own best learning rate, and say which is better.

    The same command again resumes; finished runs are skipped.
    """

    task: Annotated[str, tyro.conf.Positional] = "digits"
    """digits, digits-relu, digits-cnn, digits-sequence, digits-vit, text, tabular, digits-deep, variants, data-size,
    gan; or your own: exp.py:function, package.module:function. A demonstration without arms: style."""

    norms: str | None = None
    """Norms to compare, with commas: none,batch,group:8. Shorthand for --arms."""

    arms: str | None = None
    """Arms to compare: a norm and what goes with it, e.g. 'none+adamw, batch+dropout:0.2, batch+placement:after,
    none+init:0.1'. Optimizers: sgd, momentum, adamw."""

    sweep: str | None = None
    """Repeat the comparison over a knob: init=0.01..10, dropout=0,.1,.2,.5, batch-size=2..256, depth=10..200."""

    seeds: int | None = None
    """Fresh paired seeds of the final runs (quick 3, default 10, thorough 30)."""

    search_seeds: int | None = None
    """Seeds of the search for each arm's learning rate (quick 1, default 2, thorough 5)."""

    quick: bool = False
    """A smoke run: fewer rates, seeds and steps, of some tasks fewer arms; no evidence."""

    thorough: bool = False
    """Hours, resumable: more search seeds and final seeds; what committed records come from."""

    out: str | None = None
    """Directory of the runs (default: runs/<task>-<hash of the question>)."""

    parallel: str = "loky"
    """Who runs the cells: loky (all cores), N or loky:N (N workers), 1 (one after the other), dask, ray."""

    data: str | None = None
    """Your own data for a built-in task: MNIST-style IDX files, CIFAR-10's binary version, a folder of images with one
    folder per class, or an .npz file with x and y. Of the task gan: ring or digits."""

    depth: int | None = None
    """Layers of the network."""

    steps: int | None = None
    """Optimizer steps of a full run."""

    batch_size: int | None = None
    """Samples per step."""

    target: float | None = None
    """The validation metric that ends the race (default: the task's constant). Fix it before you look at results."""

    set: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Another option of the task or of your function, e.g. --set skip=false. May be repeated."""

    checkpoint_seconds: float = 2.0
    """Seconds between two checkpoints of a running cell."""

    json: bool = False
    """Print the summary as JSON, and nothing else."""


def main(argv: list[str]) -> int:
    asked = arguments.parse(Compare, argv, "compare")
    if asked.task in DEMONSTRATIONS:
        return _demonstrate(asked)
    if asked.quick and asked.thorough:
        raise UserError("--quick and --thorough exclude each other; give one of them, or none for the default budget")
    require("numpy", "scipy", "matplotlib")  # now, and not when hours of runs are to be analysed
    command = shlex.join(["normkit", "compare", *argv])
    try:
        result = _run(asked, command)
    except LabError as error:
        raise UserError(str(error)) from error
    except KeyboardInterrupt:
        print(f"stopped; nothing is lost. The same command goes on where it was:\n  {command}", file=sys.stderr)
        return 130
    if asked.json:
        show_json(
            encode({"answer": result.answer, "directory": result.directory, "page": result.page} | result.summary)
        )
    else:
        show_result(result.summary, result.page)
    return 0


def _demonstrate(asked: Compare) -> int:
    """A demonstration has a place, and none of the choices of a comparison."""
    from normkit.report import style

    chosen = [f.name for f in fields(Compare) if f.name not in ("task", "out", "json")]
    given = [name for name in chosen if getattr(asked, name) != getattr(Compare(), name)]
    if given:
        raise UserError(
            f"{asked.task} is a demonstration, without arms, rates or seeds, and takes no "
            f"--{given[0].replace('_', '-')}.\n  write: normkit compare {asked.task} [--out DIR]"
        )
    directory = Path(asked.out or f"runs/{asked.task}")
    with from_user():
        summary = imported.function(DEMONSTRATIONS[asked.task])(directory)
    if asked.json:
        show_json(encode({"answer": style.answer(summary), "page": str(directory / "report.html")} | summary))
    else:
        page = f"page: {directory / 'report.html'}"
        show(style.answer(summary), *map(terminal_table, style.tables(summary)), page, then="normkit compare gan")
    return 0


def _run(asked: Compare, command: str) -> Result:
    with watching(quiet=asked.json) as watcher:
        return compare(
            asked.task,
            arms=asked.arms,
            norms=asked.norms,
            sweep=asked.sweep,
            budget="quick" if asked.quick else "thorough" if asked.thorough else "default",
            seeds=asked.seeds,
            search_seeds=asked.search_seeds,
            steps=asked.steps,
            batch_size=asked.batch_size,
            target=asked.target,
            data=asked.data,
            out=asked.out,
            parallel=asked.parallel,
            checkpoint_seconds=asked.checkpoint_seconds,
            watcher=watcher,
            command=command,
            options=_options(asked),
        )


def _options(asked: Compare) -> dict[str, Any]:
    options = {} if asked.depth is None else {"depth": asked.depth}
    for item in asked.set:
        key, equals, value = item.partition("=")
        if not equals or not key.strip().isidentifier():
            raise UserError(f"--set {item!r}: write key=value, e.g. --set skip=false")
        options[key.strip()] = parse_value(value)
    return options
