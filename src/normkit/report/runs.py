"""Every run with its configuration and command; what failed stands first, with its traceback."""

from __future__ import annotations

import json
from typing import Any

from normkit.report import numbers as n
from normkit.report.document import Block, Code, Folded, Items, Table, Text
from normkit.report.labels import knob_value, label

STATES = ("done", "diverged", "failed", "running", "pending")


def runs(summary: dict[str, Any]) -> list[Block]:
    """Command, failures, final runs, search runs, and what all of them have in common."""
    experiment, every = summary["experiment"], summary["runs"]
    command = experiment.get("command")
    blocks: list[Block] = [Text("The command that makes, resumes and repeats the whole directory:")]
    blocks.append(Code(command) if command else Text("experiment.json records no command.", "note"))
    blocks.append(Text(_tally(every)))
    blocks += _unreadable(summary["problems"])
    blocks += [_failure(run) for run in every if run["state"] in ("failed", "diverged") and run["phase"] == "final"]
    searched = [_failure(run) for run in every if run["state"] == "failed" and run["phase"] == "search"]
    blocks += [Folded(f"{len(searched)} failed runs of the search", searched)] if searched else []
    blocks.append(Text("To repeat one run, delete its folder under cells/ and type the command again.", "note"))
    for phase, title in (("final", "final runs"), ("search", "runs of the learning-rate search")):
        chosen = [run for run in every if run["phase"] == phase]
        if chosen:
            blocks.append(Folded(f"{len(chosen)} {title}", [_table(summary, chosen, phase)]))
    blocks.append(Folded("Configuration of the arms", [Code(_json(experiment["arms"]))]))
    blocks.append(Folded("Configuration that all runs share", [Code(_json(summary["common_configuration"]))]))
    return blocks


def _tally(every: list[dict[str, Any]]) -> str:
    counts = [f"{sum(run['state'] == state for run in every)} {state}" for state in STATES]
    return f"{len(every)} runs: {', '.join(text for text in counts if not text.startswith('0 ')) or 'none yet'}."


def _unreadable(problems: list[dict[str, str]]) -> list[Block]:
    if not problems:
        return []
    return [
        Text("Cells that could not be read and take no part in any number:"),
        Items([item["problem"] for item in problems], [item["file"] for item in problems]),
    ]


def _failure(run: dict[str, Any]) -> Block:
    knob = "" if run["knob"] is None else f", {knob_value(run['knob'])}"
    reason = run.get("reason") or "no reason recorded"
    title = f"{run['state']}: {label(run['arm'])}{knob}, rate {n.rate(run['lr'])}, seed {run['seed']}: {reason}"
    return Folded(title, [Text(f"cells/{run['cell']}", "note"), Code(run.get("traceback") or reason)])


def _table(summary: dict[str, Any], chosen: list[dict[str, Any]], phase: str) -> Table:
    about, sweep = summary["experiment"]["metric"], summary["experiment"].get("sweep")
    header = [sweep["knob"]] if sweep else []
    header += ["arm", "learning rate", "seed", "state", "steps", "to target", "seconds to target", "best validation"]
    header += ["test", "ms per step", "attempts", "cell"] if phase == "final" else ["attempts", "cell"]
    rows = []
    for run in chosen:
        row = [knob_value(run["knob"])] if sweep else []
        row += [label(run["arm"]), n.rate(run["lr"]), str(run["seed"]), run["state"], _number(run["steps"], n.count)]
        row += [_number(run["steps_to_target"], n.count), _number(run["seconds_to_target"], n.seconds)]
        row.append(_number(run["best_validation"], lambda value: n.metric(value, about)))
        if phase == "final":
            row += [
                _number(run["test"], lambda value: n.metric(value, about)),
                _number(run["ms_per_step"], n.significant),
            ]
        rows.append([*row, str(run["attempts"] or n.NOTHING), run["cell"]])
    first = 2 if sweep else 1
    text = {first + 2, len(header) - 1}  # state and cell are words
    numeric = frozenset(set(range(first, len(header))) - text)
    return Table(header, rows, numeric=numeric)


def _number(value: Any, write: Any) -> str:
    """Statuses may hold "nan" or "inf" where a run diverged."""
    return value if isinstance(value, str) else write(value)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
