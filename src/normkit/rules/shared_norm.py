"""One batch norm on several inputs that are not alike: its running statistics fit none of them."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.rules.wording import several, where
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding
from normkit.vocabulary.prescription import Prescription

GAP = 0.5


def find(evidence: Evidence) -> Iterator[Finding]:
    gaps = {
        module: gap
        for module, gap in evidence.numbers("call_gap")
        if gap > GAP and evidence.number("keeps_statistics", module) and not evidence.number("frozen", module)
    }
    if not gaps:
        return
    worst = max(gaps, key=lambda module: gaps[module])
    places = (worst, *(module for module in gaps if module != worst))
    calls = evidence.number("calls", worst) or 2
    yield Finding(
        RULE.name,
        "warning",
        f"{several(len(gaps), 'batch norm', 'is', 'are')} called {calls:.0f} times in one pass on inputs whose means "
        f"differ by {gaps[worst]:.2g} deviations ({where(places)}): one set of running statistics serves them all",
        places,
        "call_gap",
        gaps[worst],
        GAP,
        "half a deviation",
        prescriptions=(
            Prescription(
                "statistics for each call",
                worst,
                "weights stay shared, statistics do not",
                "retrain",
                by_hand="nk.BatchNorm1d(width, statistics=nk.statistics.PerDomain(2))  # with nk.domain(0): around a "
                "call\n# or PerStep(max_length) in a recurrent network",
                arms="batch,batch+domains:2",
            ),
        ),
        check="nk.diagnose(model, batch, select='shared_norm')",
    )


RULE = Rule(
    "shared_norm",
    frozenset({"call_gap"}),
    "A batch norm that a forward pass calls several times, on inputs with different means.",
    "In training each call normalises by its own batch. In evaluation all use one average of averages, which is the "
    "distribution of none of them: siamese branches, several crops or views, steps of a recurrent network.",
    "Branches whose inputs come from one distribution.",
    ("Cooijmans et al. 2016, arXiv:1603.09025", "https://github.com/pytorch/pytorch/issues/48929"),
    find,
)
