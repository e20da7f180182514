"""Parity of the Triton kernels on a GPU, then their speed, in 8 minutes: ``python bench/gpu/measure.py``.

Parity comes first: every row on a smaller tensor against the float64 oracle, in all three types, and the paths that no
row takes (``paths.py``). A row that is red is not timed, and the status is 1. What the time does not suffice for is
recorded as ``no time``: first come the rows with a goal, then models, other rows, other contenders, each in the order
of ``rows.py``. Records are JSON lines below ``records/bench/gpu/<commit>/``; the table comes last.

    python bench/gpu/measure.py                     # all of it
    python bench/gpu/measure.py --only 'group_norm*'
    python bench/gpu/measure.py --rehearse          # the same on a CPU, toy shapes, in Triton's interpreter; no figures
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import itertools
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
if "--rehearse" in sys.argv:  # settled when Triton is loaded
    os.environ["TRITON_INTERPRET"] = "1"

import models  # noqa: E402
import paths  # noqa: E402
import torch  # noqa: E402
from clocks import DeviceClock, Rehearsal, measured  # noqa: E402
from contenders import OURS, Absent, contenders, forgetting, further  # noqa: E402
from rows import MODELS, ROWS, Part, Row  # noqa: E402
from verdict import markdown, table  # noqa: E402

from normkit.bench import parity  # noqa: E402
from normkit.bench.inputs import FORMATS, Inputs, inputs, weight_dtype  # noqa: E402
from normkit.bench.peers import ours  # noqa: E402
from normkit.kernels import plan  # noqa: E402
from normkit.kernels import triton_resident_launch as resident  # noqa: E402
from normkit.vocabulary.record import encode_line, read_lines  # noqa: E402

Record = dict[str, Any]
SECONDS = {"torch.compile, autotuned": 40.0, "torch.compile": 15.0}
CALLING = 2.0
"""Seconds that a contender may take: what is not begun in time would end after it."""
PARITY_TYPES = ("float32", "bfloat16", "float16")
ROUTES = ("passes", "resident")
"""Of statistics per channel or group: two passes over the tensor in launches of their own, or all in one launch."""
PARTS: tuple[Part, ...] = ("forward", "backward", "step")


def checks(row: Row, device: str) -> Iterator[Record]:
    """One record per type and route: the row's norm on a smaller tensor against the oracle."""
    for dtype, route in itertools.product(PARITY_TYPES, ("passes",) if row.case.features_last else ROUTES):
        with _routed(route):
            yield _check(row, dtype, route, device)


@contextlib.contextmanager
def _routed(route: str) -> Iterator[None]:
    """A small tensor goes through one launch; ``passes``: through those that a large one takes."""
    before = resident.FORWARD, resident.BACKWARD
    if route == "passes":
        resident.FORWARD = resident.BACKWARD = 0.0
    plan._plans.clear()
    try:
        yield
    finally:
        resident.FORWARD, resident.BACKWARD = before
        plan._plans.clear()


def _check(row: Row, dtype: str, route: str, device: str) -> Record:
    record = {"kind": "parity", "row": row.name, "shape": list(row.case.shape), "dtype": dtype, "route": route}
    given = inputs(row.case, dtype, row.layout, device)
    kind = getattr(torch, weight_dtype(row.case, dtype))
    try:
        right = parity.truth(row.case, given, kind)
        found = parity.check(ours(row.case, kind, given, "triton"), given, right)
        wrong = parity.objection(found)
    except Exception as error:
        return {**record, "state": "red", "why": f"{type(error).__name__}: {str(error)[:300]}"}
    if route == "resident" and not _in_one_launch():
        record["route"] = "passes"  # of this size there is no other
    return {**record, "state": "red" if wrong else "green", "why": wrong, "parity": parity.to_json(found)}


def _in_one_launch() -> bool:
    """Whether what was just called has one launch for either pass."""
    kernels = [made.kernel for made in plan._plans.values() if not isinstance(made, str)]
    return any(getattr(kernel, "_forward", None) and getattr(kernel, "_backward", None) for kernel in kernels)


def timings(row: Row, clock: Any, bandwidth: float, out_of_time: Any, who: Any) -> Iterator[Record]:
    """One record per contender."""
    given = _drawn_there(row, clock.device)
    floors = {part: row.floor(part) for part in PARTS}
    size = list(row.case.shape)
    base: Record = {"kind": "timing", "row": row.name, "shape": size, "dtype": row.dtype, "layout": row.layout}
    for name, make in who(row, given):
        record = {**base, "implementation": name, "floor_bytes": floors["step"]}
        if out_of_time(SECONDS.get(name, CALLING)):
            yield {**record, "state": "no time"}
            continue
        try:
            with forgetting():
                told = measured(clock, make().step(given))
        except Absent as reason:
            yield {**record, "state": "absent", "why": str(reason)}
            continue
        except Exception as error:
            yield {**record, "state": "failed", "why": f"{type(error).__name__}: {str(error)[:300]}"}
            continue
        rates = {part: floors[part] / (told[f"{part}_ms"] / 1e3) for part in PARTS}
        yield {
            **record,
            "state": "measured",
            **told,
            "bytes_per_second": rates["step"],
            "of_copy": {part: rate / bandwidth for part, rate in rates.items()},
        }


def _drawn_there(row: Row, device: str) -> Inputs:
    """Inputs as the benchmark's, but drawn on the device: hundreds of megabytes from the CPU would take the minutes."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(scale: float, offset: float) -> torch.Tensor:
        values = torch.empty(row.case.shape, device=device).normal_(offset, scale, generator=generator)
        last = row.layout == "channels_last"
        return values.to(getattr(torch, row.dtype), memory_format=FORMATS[values.dim()] if last else None)

    residual = draw(1.5, -0.5).requires_grad_() if row.case.residual else None
    return Inputs(draw(2.0, 1.5).requires_grad_(), residual, draw(1.0, 0.1))


Task = tuple[str, str]
"""What, and the row or path that it is of; in a process of its own where there are many."""


def carried_out(task: Task, device: str) -> list[Record]:
    """Records of parity; or nothing, but what a contender compiles is on the disk."""
    what, name = task
    if what == "path":
        return list(paths.checks(name, device))
    if what == "model":
        models.compile_once(name, device)
        return []
    row = next(row for row in ROWS if row.name == name)
    if what == "parity":
        return [{**record, "row": name} for record in checks(row.toy if device == "cpu" else row.small, device)]
    given = _drawn_there(row, device)
    with contextlib.suppress(Exception):  # who fails here fails again where it is timed, and is recorded there
        step = dict(contenders(row, given))["torch.compile"]().step(given)
        step.finish(step.forward())
    return []


def prepared(tasks: list[Task], device: str, workers: int) -> Iterator[tuple[Task, list[Record]]]:
    """All tasks: compiling takes minutes on one processor."""
    if workers <= 1:
        yield from ((task, carried_out(task, device)) for task in tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
        yield from zip(tasks, pool.map(carried_out, tasks, [device] * len(tasks)), strict=True)


def _one_thread() -> None:
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # read with the first compilation
    torch.set_num_threads(1)


def run(
    chosen: list[Row],
    wanted_models: list[str],
    clock: Any,
    minutes: float,
    write: Any,
    ways: Sequence[str] = (),
    workers: int = 1,
) -> list[Record]:
    """Parity, rows with a goal, models, models in CUDA graphs, other rows, other contenders.

    A record is written as soon as it is there.
    """
    begin, toy = time.monotonic(), clock.device == "cpu"
    out_of_time = lambda needed: time.monotonic() - begin + needed > 60 * minutes
    done: list[Record] = []

    def keep(record: Record) -> Record:
        write({**record, "rehearsal": True} if toy else record)
        done.append(record)
        return record

    sized = {row.name: row.toy if toy else row for row in chosen}
    # Rows that differ in their type are checked once, in every type.
    place = {row.name: ((row.toy if toy else row.small).case, row.layout) for row in chosen}
    checked = {place[row.name]: row.name for row in reversed(chosen)}
    tasks: list[Task] = [*(("parity", name) for name in checked.values()), *(("path", way) for way in ways)]
    if workers > 1 and minutes > 0:
        tasks += [*(("model", name) for name in wanted_models)]
        tasks += [("compile", row.name) for row in chosen if not row.brief]
    red = set()
    for (what, name), records in prepared(tasks, clock.device, workers):
        found = [keep(record) for record in records]
        if what == "parity" and any(record["state"] == "red" for record in found):
            red.add(name)
    refused = {row.name: "parity is red" for row in chosen if checked[place[row.name]] in red}
    bandwidth = clock.copy_bandwidth()
    keep({"kind": "copy", "bytes_per_second": bandwidth})

    def time_all(rows: list[Row], who: Any) -> None:
        for row in rows:
            if row.name not in refused:
                for record in timings(sized[row.name], clock, bandwidth, out_of_time, who):
                    keep({**record, "row": row.name})
            elif who is contenders:
                record = {"kind": "timing", "row": row.name, "implementation": OURS}
                keep({**record, "state": "refused", "why": refused[row.name]})

    def time_models(variants: dict[str, models.Variant]) -> None:
        for name in wanted_models:
            for record in models.records(name, clock, out_of_time, variants):
                keep(record)

    time_all([row for row in chosen if row.goals], contenders)
    time_models(models.VARIANTS)
    time_models(models.IN_GRAPHS)
    time_all([row for row in chosen if not row.goals], contenders)
    time_all(chosen, further)
    return done


def environment(clock: Any, commit: str) -> Record:
    """Of the whole run: no name of a machine or a person."""
    import triton

    gpu = torch.cuda.get_device_properties(0) if clock.device == "cuda" else None
    return {
        "kind": "environment",
        "commit": commit,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "gpu": gpu and {"name": gpu.name, "processors": gpu.multi_processor_count, "memory": gpu.total_memory},
    }


def commit() -> str:
    """Of the working tree; ``-changed`` when it is not what was committed."""
    git = lambda *words: subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True).stdout.strip()
    changed = "-changed" if git("status", "--porcelain", "--untracked-files=no") else ""
    return git("rev-parse", "--short=12", "HEAD") + changed


def main(argv: list[str]) -> int:
    asked = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    asked.add_argument("--only", action="append", default=[], help="rows, models or paths whose name fits this pattern")
    asked.add_argument("--minutes", type=float, default=8.0, help="nothing is begun that would end later")
    asked.add_argument("--out", type=Path, help="directory of the records; default records/bench/gpu/<commit>")
    asked.add_argument("--commit", help="of a copy of the working tree that git does not know")
    asked.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that check and compile")
    asked.add_argument(
        "--told",
        type=Path,
        action="append",
        help="measure nothing; the table of README.md from this record; once more: "
        "from both, and what both have from the second",
    )
    asked.add_argument("--rehearse", action="store_true", help="on a CPU, in Triton's interpreter: no figures")
    options = asked.parse_args(argv)
    if options.told is not None:
        print(markdown([record for told in options.told for record in read_lines(told / "timings.jsonl")]))
        return 0
    if not options.rehearse and not torch.cuda.is_available():
        print("error: torch sees no GPU here.\n  run this on a machine with one, or rehearse it: --rehearse")
        return 2
    chosen = [row for row in ROWS if _fits(row.name, options.only)]
    if options.rehearse:  # as toys many rows are the same
        as_toy = {(row.toy.case.op, row.toy.case.shape, row.layout, row.dtype): row for row in reversed(chosen)}
        chosen = list(as_toy.values())[::-1]
    wanted = [name for name in MODELS if _fits(name, options.only)]
    ways = [name for name in paths.PATHS if _fits(name, options.only)]
    if not chosen and not wanted and not ways:
        print(f"error: no row, model or path fits {options.only}.\n  choose from:")
        print("\n".join(f"    {name}" for name in (*(row.name for row in ROWS), *MODELS, *paths.PATHS)))
        return 2
    clock = Rehearsal() if options.rehearse else DeviceClock()
    if options.rehearse and options.out is None:
        write = lambda record: None
    else:
        directory = options.out or HERE.parent.parent / "records" / "bench" / "gpu" / (options.commit or commit())
        directory.mkdir(parents=True, exist_ok=True)
        write = _writer(directory)
    write(environment(clock, options.commit or commit()))
    workers = 1 if options.rehearse else options.workers
    records = run(chosen, wanted, clock, options.minutes, write, ways, workers)
    print(table(records))
    if options.rehearse:
        print("a rehearsal: every time above is that of an interpreter on toy shapes")
    return 1 if any(record["state"] == "red" for record in records if "state" in record) else 0


def _writer(directory: Path) -> Any:
    """Parity in a file of its own: it is what says that the kernels are right at this commit."""

    def write(record: Record) -> None:
        names = {"parity": ["parity"], "environment": ["parity", "timings"]}.get(record["kind"], ["timings"])
        for name in names:
            with open(directory / f"{name}.jsonl", "ab") as file:
                file.write(encode_line(record))

    return write


def _fits(name: str, patterns: list[str]) -> bool:
    return not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
