"""``nk.advise``: which statistics to use for a batch size, answered from committed records and from nothing else."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

PLAIN, PARTS = "batch", "batch:ghost:"
NO_DEVIATION = "batch norm of any kind: one value per channel has no deviation, and training raises"
ELSEWHERE = 4
"""A number of values per sample that differs from the measured one by more than this factor is another network."""


@dataclass(frozen=True)
class Finding:
    """One measured difference in test accuracy, and where it is written down."""

    what: str
    points: float
    """Percentage points; ``low`` and ``high`` are the ends of the interval."""
    low: float
    high: float
    verdict: str
    """``better``, ``worse`` or ``not distinguishable``: whether the interval includes 0."""
    batch_size: int
    record: str
    how: str = ""
    """What to write in a program."""

    def __str__(self) -> str:
        how = f"   {self.how}" if self.how else ""
        return f"{self.what}: {self.points:+.1f} points [{self.low:+.1f}, {self.high:+.1f}] at {self.batch_size}{how}"


@dataclass(frozen=True)
class Advice:
    """What :func:`advise` returns; it prints as sentences."""

    question: str
    use: tuple[Finding | str, ...]
    avoid: tuple[Finding | str, ...]
    undecided: tuple[Finding, ...] = ()
    """Whose interval includes 0: no reason for them, none against."""
    evidence: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [
            ("use", self.use),
            ("not", self.avoid),
            ("no difference seen", self.undecided),
            ("evidence", self.evidence),
            ("not known", self.unknown),
        ]
        lines = [self.question]
        for name, items in parts:
            lines += [f"{name if not index else '':>20}  {item}" for index, item in enumerate(items)]
        return "\n".join(lines)


def advise(*, batch_per_rank: int, world_size: int = 1, values_per_channel: int | None = None) -> Advice:
    """Say which normalization to use for batches of a size, what not, on which evidence, and what nobody has measured.

    The answer is read off the committed records of ``normkit compare digits-cnn --sweep batch-size=...``, which ship
    with the package as a digest: differences in test accuracy to plain batch norm at the same batch size, over paired
    seeds, each side at its own best learning rate. Nothing is modelled or interpolated: the nearest measured size (on a
    logarithmic scale) answers, and what lies outside the measured range is said to.

    Args:
        batch_per_rank: samples that one process normalises together.
        world_size: processes of a data-parallel training.
        values_per_channel: values that one process pools per channel: samples times height times width; ``None``:
            like the network of the records.

    Returns:
        An :class:`Advice`: print it, or read ``use``, ``avoid``, ``undecided``, ``evidence``, ``unknown``.

    Raises:
        ValueError: a number that is not whole or below 1; fewer values than samples.

    >>> import normkit as nk
    >>> advice = nk.advise(batch_per_rank=16)
    >>> advice.question
    'Batches of 16 samples in one process.'

    When not to use it: as a substitute for trying it out. The records are one small network on one data set;
    ``normkit compare my_experiment.py:run --sweep batch-size=2..64`` asks your own.
    """
    _check(batch_per_rank, world_size, values_per_channel)
    question = _question(batch_per_rank, world_size, values_per_channel)
    if values_per_channel == 1 and world_size == 1:
        return Advice(question, ("a norm that pools within a sample: layer, group or RMS norm",), (NO_DEVIATION,))
    digest = _digest()
    size = _nearest(digest, batch_per_rank)
    found = [*_arms(digest, size), *_recomputed(digest, size)]
    together = _several(digest, batch_per_rank, world_size) if world_size > 1 else ()
    better = sorted((f for f in found if f.verdict == "better"), key=lambda f: -f.points)
    plain = [] if better else [f"plain batch norm: nothing that was tried is better at {size['batch_size']}"]
    return Advice(
        question=question,
        use=(*better, *plain, *(f for f in together if f.verdict == "better")),
        avoid=tuple(f for f in (*found, *together) if f.verdict == "worse"),
        undecided=tuple(f for f in (*found, *together) if f.verdict == "not distinguishable"),
        evidence=_evidence(digest, {f.record for f in (*found, *together)} | {size["record"]}),
        unknown=tuple(_unknown(digest, size, batch_per_rank, world_size, values_per_channel)),
    )


def _check(batch_per_rank: Any, world_size: Any, values_per_channel: Any) -> None:
    asked = {"batch_per_rank": batch_per_rank, "world_size": world_size, "values_per_channel": values_per_channel}
    for name, value in asked.items():
        if value is None and name == "values_per_channel":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"advise: {name}={value!r} counts something; give a whole number from 1")
    if values_per_channel is not None and values_per_channel < batch_per_rank:
        raise ValueError(
            f"advise: values_per_channel={values_per_channel} with batch_per_rank={batch_per_rank}: every sample has "
            "at least one value per channel.\n  give samples times height times width of the input of a norm"
        )


@cache
def _digest() -> dict[str, Any]:
    text = resources.files("normkit").joinpath("small_batches.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def _nearest(digest: dict[str, Any], batch: int, record: str | None = None) -> dict[str, Any]:
    """The measured size next to a batch size; of two that are equally far the smaller. The first record by default."""
    record = record or next(iter(digest["records"]))
    sizes = [size for size in digest["sizes"] if size["record"] == record]
    return min(sizes, key=lambda size: abs(math.log(size["batch_size"] / batch)))


def _arms(digest: dict[str, Any], size: dict[str, Any]) -> list[Finding]:
    """Every other arm against plain batch norm, but for those that cut a batch: `_several` is about these."""
    found = []
    for name, arm in size["arms"].items():
        if not _known(arm["against_plain"]) or _parts(name) or digest["arms"][name]["processes"] > 1:
            continue
        words = digest["arms"][name]["words"]
        found.append(_finding(f"{words} instead of batch norm", arm["against_plain"], size, _how(digest, name)))
    return found


def _recomputed(digest: dict[str, Any], size: dict[str, Any]) -> list[Finding]:
    """Other statistics than the running ones in evaluation, for plain batch norm."""
    plain, found = size["arms"][PLAIN], []
    for key, what, how in (
        ("exact", "batch norm with statistics recomputed before evaluating", "nk.calibrate_(model, loader)"),
        ("by_batch", "batch norm by the statistics of the test batch", "norm.train() in evaluation"),
    ):
        if plain[key] and _known(plain[key]["difference"]):
            found.append(_finding(what, plain[key]["difference"], size, how))
    return found


def _several(digest: dict[str, Any], batch: int, world_size: int) -> list[Finding]:
    """Synchronising: what parts of a batch cost where each is normalised by itself, and what it gives back.

    Ghost batches are these parts: a step of several processes that are not synchronised computes just that.
    """
    found = []
    for record in digest["records"]:
        size = _nearest(digest, batch * world_size, record)
        for name, arm in size["arms"].items():
            if not _known(arm["against_plain"]):
                continue
            parts = _parts(name)
            if parts and 2 * parts <= size["batch_size"] and parts / 2 <= batch <= 2 * parts:
                what = f"synchronising, so that {size['batch_size']} samples are one batch and not parts of {parts}"
                found.append(_finding(what, _turned(arm["against_plain"]), size, "nk.sync_(model)"))
            if digest["arms"][name]["processes"] > 1:
                what = f"{digest['arms'][name]['words']} instead of one process with the whole batch"
                found.append(_finding(what, arm["against_plain"], size, "nk.sync_(model)"))
    return found


def _known(gap: dict[str, Any] | None) -> bool:
    """Whether there is an interval; an arm whose runs all diverged has none, and plain batch norm none to itself."""
    return gap is not None and gap["low"] is not None


def _turned(gap: dict[str, Any]) -> dict[str, Any]:
    """The same difference, asked the other way round."""
    verdict = {"better": "worse", "worse": "better"}.get(gap["verdict"], gap["verdict"])
    return {"value": -gap["value"], "low": -gap["high"], "high": -gap["low"], "verdict": verdict}


def _parts(name: str) -> int:
    """Samples per part of an arm with ghost batches; 0 for every other arm."""
    return int(name.removeprefix(PARTS)) if name.startswith(PARTS) else 0


def _how(digest: dict[str, Any], name: str) -> str:
    arm = digest["arms"][name]
    momentum = f", momentum={arm['running']:g}" if arm["running"] is not None else ""
    bind = " and nk.statistics.bind(norm, conv)" if "moving_average" in name else ""
    return f'nk.create("{arm["norm"]}", channels{momentum}){bind}'


def _finding(what: str, gap: dict[str, Any], size: dict[str, Any], how: str) -> Finding:
    points = {key: 100 * gap[key] for key in ("value", "low", "high")}
    return Finding(
        what, points["value"], points["low"], points["high"], gap["verdict"], size["batch_size"], size["record"], how
    )


def _question(batch: int, world_size: int, values: int | None) -> str:
    samples = f"{batch} sample{'s' if batch > 1 else ''}"
    of = f", {values} values per channel" if values is not None else ""
    where = "in one process" if world_size == 1 else f"in each of {world_size} processes"
    return f"Batches of {samples}{of} {where}."


def _evidence(digest: dict[str, Any], records: set[str]) -> tuple[str, ...]:
    return tuple(
        f"{where}: {about['title']}, {about['samples']} samples seen, {about['seeds']} paired seeds, "
        f"{100 * digest['level']:.0f} % intervals, `{about['command']}`"
        for where, about in digest["records"].items()
        if where in records
    )


def _unknown(
    digest: dict[str, Any], size: dict[str, Any], batch: int, world_size: int, values: int | None
) -> list[str]:
    first = next(iter(digest["records"]))
    sizes = [one["batch_size"] for one in digest["sizes"] if one["record"] == first]
    found = []
    for count, what in ((batch, "a batch"), (batch * world_size, "all processes together")):
        if not min(sizes) <= count <= max(sizes) and (what == "a batch" or world_size > 1):
            found.append(f"{what} of {count} samples: measured were {min(sizes)} to {max(sizes)}")
    if min(sizes) <= batch <= max(sizes) and batch != size["batch_size"]:
        found.append(f"a batch of {batch} itself: the nearest size measured is {size['batch_size']}")
    measured = digest["values_per_sample"]
    if values is not None and not 1 / ELSEWHERE <= values / batch / measured <= ELSEWHERE:
        found.append(
            f"{values / batch:g} values per channel and sample: the network of the records has {measured}, and batch "
            "norm is the noisier, the fewer there are"
        )
    if world_size > 1:
        found.append("what more processes than 2 do to each other: docs/distributed.md has the cost")
    return [*found, "other networks, data and longer training: one small network was trained on 8 x 8 digits"]
