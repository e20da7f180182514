"""Measures every healthy model and writes records/doctor/healthy.json: `python tests/record_healthy.py`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import healthy_models
import hosted_models

import normkit as nk
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.record import write_json

RECORD = Path(__file__).parent.parent / "records" / "doctor" / "healthy.json"
LIMITED = {
    "batch_noise": 0.25,
    "mean_drift": 0.5,
    "variance_drift": 0.693,
    "batch_statistics_gap": 0.5,
    "constant_share": 0.25,
    "scale_zero_share": 0.1,
    "dead_share": 0.5,
    "saturated_share": 0.5,
    "gradient_ratio": 1000.0,
    "attention_logit": 100.0,
    "call_gap": 0.5,
    "dropout_variance_shift": 0.1,
    "padding_share": 0.1,
}
"""Quantities with a threshold, and the threshold."""
Made = Callable[[], healthy_models.Patient]


def everyone() -> Iterator[tuple[str, Made]]:
    for name, build in healthy_models.OWN.items():
        yield name, lambda build=build: healthy_models.trained(build())
    for task in healthy_models.LAB:
        yield f"compare {task[0]}, {task[1]}", lambda task=task: healthy_models.lab_task(*task)
    for name in (*hosted_models.MODELS, *healthy_models.more_hosted()):
        yield f"transformers {name}", lambda name=name: healthy_models.hosted(name)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    greatest: dict[str, tuple[float, str]] = {}
    rows = []
    for name, made in everyone():
        torch.manual_seed(0)
        patient = made()
        found = nk.diagnose(patient.model, patient.batch, patient.loss_fn, patient.optimizer)
        rows.append(
            {"model": name, **found.counts, "warned": [f.rule for f in found.findings if f.severity == "warning"]}
        )
        evidence = Evidence(found.readings)
        for quantity in LIMITED:
            most = max((value for _, value in evidence.numbers(quantity) if value == value), default=None)
            if most is not None and most > greatest.get(quantity, (-1.0, ""))[0]:
                greatest[quantity] = (most, name)
    record = {
        "command": "python tests/record_healthy.py",
        "torch": torch.__version__,
        "models": len(rows),
        "errors": sum(row["error"] for row in rows),
        "warnings": sum(row["warning"] for row in rows),
        "hosted": [*hosted_models.MODELS, *healthy_models.more_hosted()],
        "rows": rows,
        "greatest": {q: {"value": v, "model": m, "threshold": LIMITED[q]} for q, (v, m) in greatest.items()},
    }
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    write_json(RECORD, record)


if __name__ == "__main__":
    main()
