"""Running statistics that are not the same in every process."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.rules.wording import several, where
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding
from normkit.vocabulary.prescription import Prescription

LIMIT = 0.1


def find(evidence: Evidence) -> Iterator[Finding]:
    far = {module: gap for module, gap in evidence.numbers("rank_spread") if gap > LIMIT}
    if not far:
        return
    worst = max(far, key=lambda module: far[module])
    places = (worst, *(module for module in far if module != worst))
    yield Finding(
        RULE.name,
        "warning",
        f"the running means of {several(len(far), 'norm')} differ between processes by up to {far[worst]:.2g} "
        "deviations "
        f"({where(places)}): each process has another model, and which one is saved is an accident",
        places,
        "rank_spread",
        far[worst],
        LIMIT,
        "a tenth of a deviation",
        prescriptions=(
            Prescription(
                "the statistics of all processes are merged",
                "",
                "one model, of all the data",
                "train_identical",
                operation="merge_statistics_",
            ),
            Prescription(
                "batch norms pool over processes",
                "",
                "statistics are then the same everywhere at every step",
                "retrain",
                operation="sync_",
                arms="batch+processes:2,batch:synchronized+processes:2",
            ),
        ),
        check="nk.merge_statistics_(model) before every evaluation and every save",
    )


RULE = Rule(
    "ranks_differ",
    frozenset({"rank_spread"}),
    "Running means of one layer that differ between processes by more than a tenth of a deviation.",
    "Each process moves its own buffers by its own batches. DDP broadcasts those of rank 0 at the next forward "
    "pass; an "
    "average of weights (EMA) that a process keeps, or a model without that broadcast, stays different.",
    "broadcast_buffers=True evens it out before every forward pass; only rank 0's data then count.",
    ("https://github.com/Megvii-BaseDetection/YOLOX/issues/1176", "timm: --dist-bn"),
    find,
)
