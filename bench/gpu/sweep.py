"""How the kernels' tensors are cut, tried one choice at a time: ``python bench/gpu/sweep.py PLAN --out FILE``.

Choices are constants of ``triton_*_launch``; what is best over the rows goes there by hand. Kernels are compiled by as
many processes as there are processors first, then timed by one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import torch  # noqa: E402
from clocks import DeviceClock  # noqa: E402
from contenders import _kind  # noqa: E402
from measure import _drawn_there  # noqa: E402
from rows import ROWS, Row  # noqa: E402

from normkit.bench.peers import ours  # noqa: E402
from normkit.kernels import plan  # noqa: E402
from normkit.kernels import triton_channels_launch as channels_launch  # noqa: E402
from normkit.kernels import triton_resident_launch as resident_launch  # noqa: E402
from normkit.kernels import triton_rows_launch as rows_launch  # noqa: E402
from normkit.kernels import triton_wide_launch as wide_launch  # noqa: E402
from normkit.kernels.triton_launch import Pace  # noqa: E402

PLACES = {
    "FE": (rows_launch, "FORWARD_EACH"), "BE": (rows_launch, "BACKWARD_EACH"), "RS": (rows_launch, "STAGES"),
    "RP": (rows_launch, "PROGRAMS"), "RT": (rows_launch, "TILE"), "X": (rows_launch, "WIDEST"),
    "R": (wide_launch, "MOST_ROWS"), "WR": (wide_launch, "MERGED"), "F": (resident_launch, "FORWARD"),
    "B": (resident_launch, "BACKWARD"), "NF": (resident_launch, "FEW"),
}  # fmt: skip
PACES = {
    "M": (channels_launch, "MEASURING"), "S": (channels_launch, "SUMMING"), "W": (channels_launch, "WRITING"),
    "N": (resident_launch, "STAYING"),
}  # fmt: skip
USUAL = {key: getattr(*place) for key, place in PLACES.items()}
USUAL_PACES = {place: dict(getattr(*place)) for place in PACES.values()}
USUAL_WIDE = wide_launch.PACE


def choose(words: str) -> None:
    """``M``, ``S``, ``W``, ``N``: tile, warps, stages, programs and channels of a pass; ``V``: of split rows; ``F``,
    ``B``: of the cache, in hundredths; ``NF``: tiles up to which fewer programs stay."""
    for key, (module, name) in PLACES.items():
        setattr(module, name, USUAL[key])
    for place, usual in USUAL_PACES.items():
        setattr(*place, dict(usual))
    wide_launch.PACE = USUAL_WIDE
    for word in words.split():
        key, value = word.split("=")
        if key in PACES:
            setattr(*PACES[key], dict.fromkeys(("planes", "columns"), Pace(*map(int, value.split(",")))))
        elif key == "V":
            wide_launch.PACE = Pace(*map(int, value.split(",")))
        elif key in ("F", "B"):
            setattr(*PLACES[key], int(value) / 100)
        else:
            setattr(*PLACES[key], int(value))
    plan._plans.clear()


def tried(row: Row, given: Any, words: str) -> Any:
    choose(words)
    return ours(row.case, _kind(row), given, "triton").step(given)


def profiled(clock: DeviceClock, step: Any) -> dict[str, float]:
    """Microseconds of every kernel."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as told:
        for _ in range(4):
            clock.flush()
            step.finish(step.forward())
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in told.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found.setdefault(event.name, []).append(event.device_time)
    return {name[:24]: sum(v[1:]) / 3 for name, v in found.items() if len(v) == 4 and "reduce_kernel" not in name[:60]}


def main() -> None:
    asked = argparse.ArgumentParser()
    asked.add_argument("plan", type=Path, help='lines of "row name | choices"')
    asked.add_argument("--out", type=Path)
    asked.add_argument("--compile", help="I/N: compile every N-th line from the I-th on, time nothing")
    asked.add_argument("--workers", type=int, default=os.cpu_count())
    asked.add_argument("--profile", action="store_true", help="the time of every kernel, too")
    options = asked.parse_args()
    rows = {row.name: row for row in ROWS}
    lines = [line.split("|") for line in options.plan.read_text().splitlines() if line.strip()]
    work = [(rows[name.strip()], words.strip()) for name, words in lines]
    if options.compile:
        first, each = map(int, options.compile.split("/"))
        for row, words in work[first::each]:
            try:
                given = _drawn_there(row, "cuda")
                step = tried(row, given, words)
                step.finish(step.forward())
            except Exception as error:
                print("compile", row.name, words, type(error).__name__, str(error)[:300], flush=True)
        return
    begin = time.monotonic()
    command = [sys.executable, __file__, str(options.plan), "--compile"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for process in [
        subprocess.Popen([*command, f"{i}/{options.workers}"], env=environment) for i in range(options.workers)
    ]:
        process.wait()
    print(f"compiled in {time.monotonic() - begin:.0f} s", flush=True)
    clock = DeviceClock()
    bandwidth = clock.copy_bandwidth()
    print(f"copy {bandwidth / 1e12:.3f} TB/s", flush=True)
    before, given = None, None
    with open(options.out, "w") as file:
        for row, words in work:
            try:
                if row is not before:
                    before, given = row, None
                    given = _drawn_there(row, "cuda")
                step = tried(row, given, words)
                told = clock.events(step)
                each = profiled(clock, step) if options.profile else {}
            except Exception as error:
                print(row.name, words, type(error).__name__, str(error)[:300], flush=True)
                continue
            backward = told["step_ms"] - told["forward_ms"]
            share = [row.floor(p) / bandwidth * 1e3 for p in ("forward", "backward", "step")]
            shares = [share[0] / told["forward_ms"], share[1] / backward, share[2] / told["step_ms"]]
            record = {"row": row.name, "choices": words, **told, "of_copy": shares, "kernels": each}
            file.write(json.dumps(record) + "\n")
            file.flush()
            print(
                f"{row.name[:44]:44} {words:34} {told['forward_ms']:.4f} {backward:.4f}  "
                + " ".join(f"{x:.2f}" for x in shares)
                + "  "
                + " ".join(f"{name}:{value:.1f}" for name, value in each.items()),
                flush=True,
            )
    print(f"done in {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
