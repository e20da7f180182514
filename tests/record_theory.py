"""Measures what papers say of norms at initialisation, for records/doctor/theory.json: `python tests/record_theory.py`.

Growth of squared gradients per layer (Yang et al. 2019), stable rank behind many layers (Daneshmand et al. 2020), and
whether gradients of weights before a norm are orthogonal to them (van Laarhoven 2017).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

import normkit as nk
from normkit.vocabulary.record import write_json
from test_theory import SCALE_FREE, Skip, along, deep, rate, stable_rank

RECORD = Path(__file__).parent.parent / "records" / "doctor" / "theory.json"
WIDTH, DEPTH, SEEDS = 512, 50, 6
BATCHES = {4: 2.95, 8: 1.80, 32: 1.52, 128: 1.463, 256: 1.449}
"""Batch size, and the growth per layer that an independent implementation had found (numpy, 3 seeds)."""
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "no norm": lambda: deep(DEPTH, WIDTH, None),
    "layer norm": lambda: deep(DEPTH, WIDTH, nk.LayerNorm),
    "batch norm, with skips": lambda: nn.Sequential(*(Skip(deep(1, WIDTH, nk.BatchNorm1d)) for _ in range(DEPTH))),
}


def spread(build: Callable[[], nn.Module], batch: int) -> dict[str, float]:
    """Mean, least and greatest growth over the seeds."""
    rates = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        rates.append(rate(build(), batch, WIDTH))
    return {"mean": sum(rates) / SEEDS, "least": min(rates), "greatest": max(rates)}


def growths() -> list[dict[str, Any]]:
    batch_norm = lambda: deep(DEPTH, WIDTH, nk.BatchNorm1d)
    rows = [{"network": "batch norm", "batch": n, "before": was, **spread(batch_norm, n)} for n, was in BATCHES.items()]
    return rows + [{"network": name, "batch": 128, **spread(build, 128)} for name, build in OTHERS.items()]


def main() -> None:
    torch.set_num_threads(1)
    record = {
        "command": "python tests/record_theory.py",
        "torch": torch.__version__,
        "width": WIDTH,
        "depth": DEPTH,
        "seeds": SEEDS,
        "growth": growths(),
        "stable_rank": {
            name: stable_rank(norm)
            for name, norm in (("batch norm", nk.BatchNorm1d), ("layer norm", nk.LayerNorm), ("no norm", None))
        },
        "gradient_along_weight": {name: along(name)[0] for name in SCALE_FREE},
    }
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    write_json(RECORD, record)


if __name__ == "__main__":
    main()
