"""``normkit bench``: time the layers against torch's own, and prove that they compute the same first."""

from __future__ import annotations

import datetime
import difflib
import os
import platform
import shlex
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table as Printed

import normkit
from normkit.bench import cases, memory, peers
from normkit.bench.allocator import ALLOCATORS
from normkit.bench.blocks import BLOCKS
from normkit.bench.plan import EFFORTS, MODELS, SPECIAL, Plan, Task, case_of, tasks
from normkit.bench.run import run
from normkit.bench.training import NO_NORMS, VARIANTS
from normkit.cli import arguments
from normkit.cli.environment import gpus, kernels, processor, software
from normkit.cli.errors import UserError, from_user
from normkit.cli.output import show, show_json
from normkit.report import bench_page
from normkit.report.document import Table
from normkit.vocabulary.record import encode

Several = tyro.conf.UseAppendAction


@dataclass
class Bench:
    """Time the layers against torch's own. Parity with the reference comes first: a wrong result gets no number."""

    op: Annotated[list[str], tyro.conf.arg(metavar="NAME"), Several] = field(default_factory=list)
    """What to time; may be repeated, * stands for anything: batch_norm+add+relu, group_norm*, overhead (the fixed cost
    of a call), memory (what is kept for the backward pass), synchronized (statistics of 1 to 3 processes), watch (a
    training step that nk.watch watches; watch_resnet50, watch_transformer), blocks (recurrent and Transformer layers
    against torch's; recurrent, transformer_layer), resnet50, unet, transformer, models (training steps). Default: every
    op; --list shows them."""
    shape: Annotated[list[str], tyro.conf.arg(metavar="N,C,..."), Several] = field(default_factory=list)
    """Only this shape, or one of your own: 32,64,56,56. May be repeated."""
    dtype: Annotated[list[str], tyro.conf.arg(metavar="TYPE"), Several] = field(default_factory=list)
    """float32, bfloat16, float16, float64; may be repeated. Default: float32 and bfloat16 (quick: float32)."""
    layout: Annotated[list[str], tyro.conf.arg(metavar="LAYOUT"), Several] = field(default_factory=list)
    """contiguous, channels_last; may be repeated. Default: all that the shape has (quick: contiguous)."""
    implementation: Annotated[list[str], tyro.conf.arg(metavar="NAME"), Several] = field(default_factory=list)
    """Only these beside torch: normkit, normkit:torch, torch.compile, torch again (the noise) ...; may be repeated.
    Default: all but the noise (quick: normkit)."""
    allocator: Literal["both", "default", "pinned"] = "both"
    """How the C library treats freed memory: as it does by default, or kept (each in a process of its own)."""
    threads: int | None = None
    """Threads of torch. Default: as many as cores."""
    device: str = "cpu"
    """Where to measure: cpu, cuda."""
    quick: bool = False
    """A minute: one case per norm, float32, without torch.compile."""
    thorough: bool = False
    """Hours: every case, more rounds."""
    out: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory of the records and the page. Default: runs/bench-<time>."""
    listing: Annotated[bool, tyro.conf.arg(name="list")] = False
    """Show what would be timed and why, and time nothing."""
    json: bool = False
    """Print the records as JSON, and nothing else."""


def main(argv: Sequence[str]) -> int:
    asked = arguments.parse(Bench, [*argv], "bench")
    plan = _plan(asked)
    if asked.listing:
        _show_plan(plan, asked)
        return 0
    directory = _directory(asked)
    with _progress(plan, quiet=asked.json) as progress, from_user():
        records = run(plan, directory, _environment(argv, plan), progress)
        page = bench_page.write(directory)
    answer = bench_page.answer(records)
    if asked.json:
        show_json(encode({"answer": answer, "directory": directory, "page": page, "records": records}))
    else:
        parts = [_printed(table) for table in bench_page.tables(records)]
        show(answer, *parts, f"page: {page}", then=_next(asked))
    return 1 if any(record.get("state") in ("refused", "failed") for record in records) else 0


def _plan(asked: Bench) -> Plan:
    if asked.quick and asked.thorough:
        raise UserError("--quick and --thorough exclude each other; give one of them, or none for the default cases")
    level: cases.Level = "quick" if asked.quick else "thorough" if asked.thorough else "default"
    for option, words, known in (
        ("dtype", asked.dtype, cases.DTYPES),
        ("layout", asked.layout, cases.LAYOUTS),
        (
            "implementation",
            asked.implementation,
            list(dict.fromkeys([*peers.all_names(), *VARIANTS, NO_NORMS, *memory.VARIANTS])),
        ),
    ):
        for word in words:
            _known(option, word, known)
    for word in asked.op:
        if not any(sign in word for sign in "*?["):
            _known("op", word, [*cases.names(), *SPECIAL])
    shapes = [arguments.shape(text) for text in asked.shape]
    with from_user():
        found = tasks(level, asked.op, shapes, asked.dtype, asked.layout)
    effort = EFFORTS[level]
    if asked.implementation:
        effort = replace(effort, wanted=tuple(asked.implementation))
    elif "overhead" in asked.op:  # every backend, and nobody waits for a compiler
        effort = replace(effort, wanted=(peers.AGAIN, *(n for n in peers.all_names() if n.startswith("normkit"))))
    threads = _cores() if asked.threads is None else asked.threads
    if threads < 1:
        raise UserError(f"--threads {threads}: at least one thread has to do the work")
    _device(asked.device)
    allocators: Sequence[str] = ALLOCATORS if asked.allocator == "both" else (asked.allocator,)
    if asked.device != "cpu" or asked.op == ["synchronized"]:
        allocators = ALLOCATORS[:1]  # the C library's has no say on a GPU, nor on processes that talk
    return Plan(found, effort, allocators, threads, asked.device)


def _known(option: str, word: str, known: Sequence[str]) -> None:
    if word in known:
        return
    near = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    suggestion = f"  did you mean {near[0]}?\n" if near else ""
    raise UserError(f"--{option} {word!r} is unknown.\n{suggestion}  choose from: {', '.join(known)}")


def _device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used here.\n  {reason}\n  `normkit env` lists the GPUs") from error


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _directory(asked: Bench) -> Path:
    """Where the records go; a directory that has some already keeps them and gets no more."""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    path = Path(asked.out or f"runs/bench-{stamp}")
    if (path / "bench.jsonl").exists():
        raise UserError(f"--out {path}: holds the records of another run.\n  name a new directory, or remove that one")
    return path


def _environment(argv: Sequence[str], plan: Plan) -> dict[str, Any]:
    """Hardware and versions; no path, no host name, no user name."""
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    command = shlex.join(["normkit", "bench", *argv])
    return {
        "command": command,
        "created": created,
        "commit": _commit(),
        "compiled kernels": kernels()["compiled kernels"],
        **software(),
        **processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads of torch": plan.threads,  # of the processes that measure, not of this one
        "GPUs": gpus(),
    }


def _commit() -> str:
    """The commit of the source tree that runs, with + where it has been changed since."""
    source = Path(normkit.__file__).parent

    def git(*words: str) -> str:
        result = subprocess.run(
            ["git", "-C", str(source), *words], capture_output=True, text=True, timeout=5, check=True
        )
        return result.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown: not a source tree"


@contextmanager
def _progress(plan: Plan, *, quiet: bool) -> Iterator[Callable[[str, Task], None]]:
    """A line on the terminal that says what is being measured; nothing where standard error is no terminal."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda allocator, task: None
        return
    total, done = len(plan.tasks) * len(plan.allocators), 0
    with console.status("starting") as status:

        def progress(allocator: str, task: Task) -> None:
            nonlocal done
            done += 1
            status.update(f"{done} of {total}: {_words(task)}, {allocator} allocator")

        yield progress


def _words(task: Task) -> str:
    if task["kind"] in ("model", "watch"):
        layout = task.get("layout", "").replace("_", " ")
        return f"{MODELS[task['model']].told}, {task['dtype']} {layout}".rstrip()
    if task["kind"] == "block":
        return f"{task['block']}, {task['dtype']}"
    if task["kind"] == "memory":
        return f"{memory.OP} {task['dtype']}"
    case = case_of(task)
    processes = f", {task['processes']} processes" if "processes" in task else ""
    return f"{case.op} {'x'.join(map(str, case.shape))} {task['dtype']} {task['layout'].replace('_', ' ')}{processes}"


def _show_plan(plan: Plan, asked: Bench) -> None:
    listing = Printed("op", "shape", "type", "layout", "why", box=None, padding=(0, 2, 0, 0))
    rows = []
    for task in plan.tasks:
        if task["kind"] in ("model", "watch"):
            rows.append([task["model"], "", task["dtype"], task.get("layout", ""), MODELS[task["model"]].told])
        elif task["kind"] == "block":
            rows.append([task["block"], "", task["dtype"], "", BLOCKS[task["block"]].told])
        elif task["kind"] == "memory":
            rows.append([memory.OP, ",".join(map(str, memory.SHAPE)), task["dtype"], "contiguous", memory.REASON])
        else:
            case = case_of(task)
            shape = ",".join(map(str, case.shape))
            op = f"{case.op}, {task['processes']} processes" if "processes" in task else case.op
            rows.append([op, shape, task["dtype"], task["layout"], case.reason])
    answer = f"{len(rows)} cells would be timed, each with the allocator {' and '.join(plan.allocators)}"
    if asked.json:
        show_json({"answer": answer, "cells": [dict(zip(("op", "shape", "dtype", "layout", "why"), r)) for r in rows]})  # noqa: B905
        return
    for row in rows:
        listing.add_row(*row)
    show(answer, listing, then="normkit bench --quick")


def _printed(table: Table) -> Printed:
    """A table of the page on the terminal."""
    made = Printed(box=None, padding=(0, 2, 0, 0), title=table.caption, title_justify="left", title_style="")
    for index, name in enumerate(table.header):
        made.add_column(name, justify="right" if index in table.numeric else "left")
    for row in table.rows:
        made.add_row(*row)
    return made


def _next(asked: Bench) -> str:
    if asked.quick:
        return "normkit bench --op 'batch_norm*'"
    return "normkit bench --op overhead" if "overhead" not in asked.op else "normkit bench --quick"
