"""The comparisons of adversarial networks -> the table and the sentences of docs/conditional-and-gan.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from normkit.report import numbers as n
from normkit.report.document import Table
from normkit.report.generated import written
from normkit.report.labels import label, sentence

Summary = Mapping[str, Any]
Pair = tuple[str, str]
GENERATOR, DISCRIMINATOR = "batch+side:generator", "batch+side:discriminator"
MIXED, VIRTUAL, SPECTRAL = (
    f"{DISCRIMINATOR}+statistics:mixed",
    "batch:virtual+side:generator",
    "none+spectral:discriminator",
)
QUESTIONS: dict[str, tuple[Pair, ...]] = {
    "In which of the two networks does batch norm help?": (
        (GENERATOR, "none"),
        (DISCRIMINATOR, "none"),
        ("batch", "none"),
    ),
    "Do statistics that real and generated samples share change it?": ((MIXED, DISCRIMINATOR), (MIXED, "none")),
    "Does virtual batch norm?": ((VIRTUAL, GENERATOR), (VIRTUAL, "none")),
    "How does spectral norm compare?": ((SPECTRAL, "none"), (SPECTRAL, GENERATOR), (SPECTRAL, DISCRIMINATOR)),
}
"""Each with the arms that answer it: (arm, against what)."""
VERDICTS = {"better": "is better than", "worse": "is worse than", "not distinguishable": "is not distinguishable from"}


def pairs(summary: Summary) -> list[Pair]:
    """The pairs of all questions of which the summary has both arms."""
    there = {arm["name"] for arm in summary["points"][0]["arms"]}
    return [pair for asked in QUESTIONS.values() for pair in asked if set(pair) <= there]


def table(summary: Summary) -> Table:
    """Every arm: the metric, modes, collapses, the discriminator's loss; and below all what real samples have."""
    about, arms = summary["experiment"]["metric"], summary["points"][0]["arms"]
    header = [
        "",
        "rate",
        about["name"],
        "modes covered",
        "high-quality share",
        "collapsed",
        "loss variance",
        "diverged",
    ]
    rows = [_row(arm, about) for arm in arms]
    floor = next(arm["measures"]["real_against_real"] for arm in arms if arm.get("measures"))
    rows.append(["Real against real", n.NOTHING, n.metric_interval(floor, about), *[n.NOTHING] * (len(header) - 3)])
    return Table(header, rows, numeric=frozenset(range(1, len(header))))


def _row(arm: Mapping[str, Any], about: dict[str, Any]) -> list[str]:
    measured, runs = arm.get("measures") or {}, arm["runs"]
    names = ("modes_covered", "high_quality_share", "collapsed", "loss_variance")
    return [
        sentence(label(arm["name"])).rstrip("."),
        n.rate(arm["lr"]),
        n.metric_interval(arm["test"], about),
        *(written(measured.get(name), name) for name in names),
        f"{runs['diverged']} of {runs['finished']}",
    ]


def sentences(summary: Summary, gaps: Mapping[Pair, Mapping[str, Any]]) -> list[str]:
    """One paragraph per question; gaps: the paired difference of the test metric, arm less the other."""
    told = []
    for question, asked in QUESTIONS.items():
        clauses = [_clause(summary, pair, gaps[pair]) for pair in asked if pair in gaps]
        if clauses:
            told.append(f"**{question}** {' '.join(sentence(clause) for clause in clauses)}")
    return told


def _clause(summary: Summary, pair: Pair, gap: Mapping[str, Any]) -> str:
    """ "batch norm in the generator is better than no normalization: +3.1 points [2.0, 4.2]; collapsed 0 of 10 ..."."""
    about = summary["experiment"]["metric"]
    first, second = (label(name) for name in pair)
    if gap["verdict"] not in VERDICTS:
        return f"{first} and {second} have no pair of runs to compare"
    own, other = (_collapsed(summary, name) for name in pair)
    runs = "" if own is None or other is None else f"; {own} runs collapse{'' if own == other else f', not {other}'}"
    return f"{first} {VERDICTS[gap['verdict']]} {second} ({about['name']} {n.difference(dict(gap), about)}{runs})"


def _collapsed(summary: Summary, name: str) -> str | None:
    arm = next(arm for arm in summary["points"][0]["arms"] if arm["name"] == name)
    found = (arm.get("measures") or {}).get("collapsed")
    return f"{found['true']} of {found['of']}" if found else None
