"""The page: which section says what, in which order. Setting it in type is html.py's and markdown.py's work."""

from __future__ import annotations

import json
from typing import Any

from normkit.report import generated
from normkit.report import table as tables
from normkit.report.details import details
from normkit.report.document import Block, Document, Folded, Items, Legend, Section, Table, Text
from normkit.report.labels import knob_value, knob_words, label
from normkit.report.methods import methods
from normkit.report.plots.canvas import colours
from normkit.report.plots.cost import step_cost
from normkit.report.plots.inside import gradient_norms, unit_percentiles
from normkit.report.plots.learning import learning_curves
from normkit.report.plots.rates import sensitivity
from normkit.report.plots.speed import speed_up
from normkit.report.plots.sweep import over_the_knob
from normkit.report.plots.time_steps import state_gradients
from normkit.report.runs import runs
from normkit.report.words import verdict

Summary = dict[str, Any]
OPENED_VALUES = 7  # of a sweep's values have figures of their own, so that the page stays a page

UNIT_NOTE = (
    "Percentiles 15, 50 and 85 of the input to the non-linearity of one unit of the last hidden layer, over fixed "
    "validation samples, first final seed; all arms on one scale. That normalization steadies these moments does not "
    "explain why it speeds training up (Santurkar et al. 2018)."
)
GRADIENT_NOTE = (
    "Gradient norm of every weight matrix, median of the seeds: a line that falls or climbs by orders of magnitude "
    "means that some layers hardly learn."
)
STATE_NOTE = (
    "Norm of the gradient of the loss by the state h of a recurrent network at each time step, on the batch of that "
    "training step, median of the seeds: a line that falls towards the first time step means that little is learnt "
    "from what was read early."
)

AT_TEST_NOTE = (
    "The same trained weights, on test data: with the running statistics, as the table above; with statistics computed "
    "anew over the training set; with those of the test batch. In brackets behind the difference to the first, paired "
    "by seed, 95 %."
)

LIKE_NOTE = (
    "Like for like: each arm against the network without a norm that has the same optimizer, dropout and initial gain."
)


def document(summary: Summary) -> Document:
    """The whole page of one experiment."""
    experiment = summary["experiment"]
    sections = [
        Section("answer", "Answer", _answer(summary)),
        Section("table", "Table", _table(summary)),
        *_at_test(summary),
        *generated.sections(summary),
        Section("learning", "Learning curves", _learning(summary)),
        Section("rates", "Learning-rate sensitivity", _rates(summary)),
        Section("inside", "What happens inside", _inside(summary)),
        Section("cost", "Cost", _cost(summary)),
        Section("runs", "Every run", runs(summary)),
        Section("methods", "How each number is computed", _methods(summary)),
        Section("environment", "Environment", _environment(summary)),
    ]
    if experiment.get("sweep"):
        sections.insert(2, Section("sweep", f"Along {knob_words(experiment)}", _sweep(summary)))
    title = experiment.get("title") or experiment.get("name") or experiment.get("task") or "Experiment"
    return Document(title, experiment.get("description") or "", sections, colours(experiment), _footer(experiment))


def _answer(summary: Summary) -> list[Block]:
    picture = [] if summary["experiment"].get("sweep") else speed_up(summary)
    below = details(summary)
    return [Text(verdict(summary), "answer"), *picture, *([Items(below)] if below else [])]


def _table(summary: Summary) -> list[Block]:
    experiment = summary["experiment"]
    note = (
        f"Ratios and differences are against {label(experiment['baseline'])}, seed by seed, over "
        f"{len(experiment['seeds'])} seeds; in brackets 95 % bootstrap intervals. Each arm trains at its own best "
        "learning rate."
    )
    alike = tables.like_for_like(summary)
    like_for_like: list[Block] = [Text(LIKE_NOTE, "note"), alike] if alike else []
    return [
        Text(note, "note"),
        tables.table(summary, tables.RESULTS),
        tables.table(summary, tables.race_columns(summary)),
        *like_for_like,
    ]


def _at_test(summary: Summary) -> list[Section]:
    """Only where somebody has measured it: records older than the question have no such section."""
    found = tables.at_test(summary)
    return [Section("at-test", "Statistics at test time", [Text(AT_TEST_NOTE, "note"), found])] if found else []


def _legend(summary: Summary) -> Legend:
    return Legend([(arm["name"], label(arm["name"])) for arm in summary["experiment"]["arms"]])


def _sweep(summary: Summary) -> list[Block]:
    note = (
        "One curve per arm; bars are 95 % intervals, drawn up to the median where their upper end is open. ○ at the "
        "upper edge: half of the runs or fewer reach the target."
    )
    return [Text(note, "note"), _legend(summary), *over_the_knob(summary)]


def _per_point(summary: Summary, prefix: str, draw: Any) -> list[Block]:
    """The figures of the one point, or those of the knob's values, each behind a line that opens them."""
    if not summary["experiment"].get("sweep"):
        return list(draw(summary, summary["points"][0], prefix))
    knob, points = knob_words(summary["experiment"]), summary["points"]
    last, most = len(points) - 1, min(len(points), OPENED_VALUES)
    chosen = sorted({round(i * last / max(1, most - 1)) for i in range(most)})
    folded: list[Block] = []
    for index in chosen:
        figures = list(draw(summary, points[index], f"{prefix}-{index}"))
        if figures:
            folded.append(Folded(f"{knob} {knob_value(points[index]['knob'])}", figures))
    if folded and len(chosen) < len(points):
        folded.append(Text(f"{len(chosen)} of the {len(points)} values are drawn; summary.json holds all.", "note"))
    return folded


def _learning(summary: Summary) -> list[Block]:
    note = (
        "Median of the seeds; the band reaches from the worst seed to the best. The dot is when the median seed first "
        "reaches the target."
    )
    return _or_nothing([Text(note, "note"), _legend(summary)], _per_point(summary, "learning", learning_curves))


def _rates(summary: Summary) -> list[Block]:
    note = (
        "Every arm had the same grid and the same number of trials; the ring is the rate it was then run with. A wide "
        "range means that the rate hardly has to be tuned. A search run ends when it reaches the target, so its best "
        "value says how near a rate comes, not how far it could go. Bars: thick where most search runs reach the "
        "target, thin where most do not diverge; ticks are the rates tried."
    )
    return _or_nothing([Text(note, "note"), _legend(summary)], _per_point(summary, "rates", sensitivity))


def _inside(summary: Summary) -> list[Block]:
    units = _per_point(summary, "unit", unit_percentiles)
    gradients = _per_point(summary, "gradient", gradient_norms)
    by_time = _per_point(summary, "time-steps", state_gradients)
    extras = tables.extras(summary)
    blocks: list[Block] = [_legend(summary)] if units or gradients or by_time else []
    if units:
        blocks += [Text(UNIT_NOTE, "note"), *units]
    if gradients:
        blocks += [Text(GRADIENT_NOTE, "note"), *gradients]
    if by_time:
        blocks += [Text(STATE_NOTE, "note"), *by_time]
    if extras:
        blocks.append(tables.table(summary, extras, "Medians of the final runs"))
    if by_norm := tables.variance_by_norm(summary):
        blocks.append(Folded("The variance ratio at each norm", [by_norm]))
    return _or_nothing([], blocks)


def _cost(summary: Summary) -> list[Block]:
    return [*_per_point(summary, "cost", step_cost), tables.table(summary, tables.cost_columns(summary))]


def _methods(summary: Summary) -> list[Block]:
    terms = methods(summary)
    return [Items(list(terms.values()), list(terms))]


def _environment(summary: Summary) -> list[Block]:
    environment = summary["experiment"].get("environment") or {}
    rows = [[str(key), value if isinstance(value, str) else json.dumps(value)] for key, value in environment.items()]
    rows += [
        [f"continued with other {key}", str(later[key])]
        for later in summary["experiment"].get("continued_in", [])
        for key in later
        if later[key] != environment.get(key)
    ]
    created = summary["experiment"].get("created")
    rows += [["created", str(created)]] if created else []
    return [Table(["what", "value"], rows)] if rows else [Text("experiment.json names no environment.", "note")]


def _or_nothing(introduction: list[Block], blocks: list[Block]) -> list[Block]:
    """A section that has nothing to show says so instead of vanishing."""
    return introduction + blocks if blocks else [Text("No finished run has recorded this yet.", "note")]


def _footer(experiment: dict[str, Any]) -> str:
    version = (experiment.get("environment") or {}).get("normkit", "")
    return (
        f"Made by normkit {version} from the run directory alone; `normkit report DIR` makes it again. "
        "summary.json holds the same numbers, unrounded."
    )
