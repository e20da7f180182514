"""Summaries of sweeps over the batch size -> the digest that `nk.advise` and docs/small-batches.md answer from.

Everything is against plain batch norm at the same batch size, seed by seed; a summary is against its own baseline.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from normkit.lab.analyse.against import against, final_runs, rounded
from normkit.lab.analyse.intervals import LEVEL
from normkit.report.labels import label

PLAIN = "batch"
Summary = Mapping[str, Any]


def digest(records: Mapping[str, Summary], values_per_sample: int) -> dict[str, Any]:
    """What the records say, by their paths in the repository, in the order of the sizes.

    values_per_sample: how many values of a channel a norm of the network sees per sample.
    """
    return {
        "level": LEVEL,
        "values_per_sample": values_per_sample,
        "records": {where: _about(summary["experiment"]) for where, summary in records.items()},
        "arms": {
            arm["name"]: {
                "words": label(arm["name"].partition("+running")[0]),
                "norm": arm["norm"],
                "running": arm.get("running"),
                "processes": arm.get("processes", 1),
            }
            for summary in records.values()
            for arm in summary["experiment"]["arms"]
        },
        "sizes": sorted(
            (_size(where, summary, point) for where, summary in records.items() for point in summary["points"]),
            key=lambda size: (size["batch_size"], list(records).index(size["record"])),
        ),
    }


def _about(experiment: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "command": experiment["command"],
        "title": experiment["title"],
        "seeds": len(experiment["seeds"]),
        "samples": experiment["steps"] * experiment["batch_size"],
        "target": experiment["target"],
        "processor": experiment["environment"]["processor"],
        "torch": experiment["environment"]["torch"],
    }


def _size(where: str, summary: Summary, point: Mapping[str, Any]) -> dict[str, Any]:
    """All arms at one batch size."""
    about = {arm["name"]: arm for arm in point["arms"]}
    runs = final_runs(summary, point["knob"])
    higher = summary["experiment"]["metric"]["higher_is_better"]
    return {
        "batch_size": point["knob"],
        "record": where,
        "arms": {
            name: {
                "lr": arm["lr"],
                "reached": [arm["runs"]["reached"], arm["runs"]["finished"]],
                "steps_to_target": arm["steps_to_target"]["median"],
                "test": rounded(arm["test"]),
                "against_plain": None if name == PLAIN else against(PLAIN, runs, name, higher),
                "exact": rounded(arm.get("test_exact")),
                "by_batch": rounded(arm.get("test_batch")),
                "cpu_ms": rounded(arm.get("cpu_ms_per_step")),
                "memory_mb": arm["peak_memory_mb"],
            }
            for name, arm in about.items()
        },
    }
