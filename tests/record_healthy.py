"""Measures every healthy model and writes records/doctor/healthy.json: `python tests/record_healthy.py`."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).parent))

import healthy_models
import hosted_models
import normkit as nk
from normkit.measure import measure
from normkit.rules import (
    attention_logits,
    constant_channels,
    dead_activations,
    dropout_before_norm,
    few_values_per_channel,
    gradients_explode,
    imprecise_arithmetic,
    padding_in_statistics,
    pruned_channels,
    saturated_activations,
    shared_norm,
    stale_statistics,
    train_eval_gap,
)
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.reading import Reading
from normkit.vocabulary.record import write_json

RECORD = Path(__file__).parent.parent / "records" / "doctor" / "healthy.json"
LIMITED = {
    "batch_noise": few_values_per_channel.NOISE,
    "mean_drift": stale_statistics.MEAN,
    "variance_drift": stale_statistics.VARIANCE,
    "batch_statistics_gap": train_eval_gap.GAP,
    "constant_share": constant_channels.SHARE,
    "scale_zero_share": pruned_channels.SHARE,
    "dead_share": dead_activations.SHARE,
    "saturated_share": saturated_activations.SHARE,
    "gradient_ratio": gradients_explode.RATIO,
    "attention_logit": attention_logits.LOGIT,
    "call_gap": shared_norm.GAP,
    "dropout_variance_shift": dropout_before_norm.SHIFT,
    "padding_share": padding_in_statistics.SHARE,
    "arithmetic_error": imprecise_arithmetic.LIMIT,
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


def in_bfloat16(patient: healthy_models.Patient) -> list[Reading]:
    """The arithmetic of the norms of the same model, cast as a whole."""
    narrow = lambda leaf: leaf.bfloat16() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf
    model, batch = copy.deepcopy(patient.model).bfloat16(), pytree.tree_map(narrow, patient.batch)
    return measure(model, batch, quantities=["arithmetic_error"])


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
        evidence = Evidence([*found.readings, *in_bfloat16(patient)])
        for quantity in LIMITED:
            constant = {name for name, frozen in evidence.numbers("frozen") if frozen}
            values = [value for module, value in evidence.numbers(quantity) if module not in constant]
            most = max((value for value in values if value == value), default=None)
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
