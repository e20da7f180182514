"""The page of a diagnosis, of one batch or of a watched run: which section says what, in which order."""

from __future__ import annotations

import json
from typing import Any

from normkit.report import html, layer_table, markdown
from normkit.report import run_sections as run
from normkit.report.document import Block, Code, Document, Folded, Items, Section, Table, Text
from normkit.report.finding_parts import parts, value
from normkit.report.glossary import glossary
from normkit.report.labels import listing
from normkit.report.numbers import share
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.reading import Reading
from normkit.vocabulary.record import decode

COLOURS = {"error": 2, "warning": 5, "note": 1}
RAW = 600
"""Readings that the appendix lists; the file beside the page has them all."""

Data = dict[str, Any]


def page(data: Data) -> str:
    """One HTML file without script or link outwards, from the JSON of a diagnosis (``Diagnosis.to_json``)."""
    return html.render(document(data))


def text(data: Data) -> str:
    """The same as Markdown."""
    return markdown.render(document(data))


def document(data: Data) -> Document:
    """Verdict, findings, the three evaluations, layers, maps, updates, processes, the first NaN, the rest."""
    data = decode(data)
    evidence = Evidence(map(_reading, data["readings"]))
    findings, watched = data["findings"], data.get("run") or {}
    nan = (watched.get("first_nan") or {}).get("step")
    table = layer_table.layers(evidence, findings, nan) or [layer_table.EMPTY]
    sections = [
        Section("answer", "Verdict", [Text(data["verdict"], "answer"), Items(_strip(data))]),
        Section("findings", "Findings", parts(findings, evidence) or [Text("None.", "note")]),
        *run.three_curves(evidence),
        Section("layers", "Layers", table),
        *run.heat_maps(evidence),
        *run.updates(evidence),
        *run.ranks(evidence),
        *run.first_nan(watched.get("first_nan")),
        Section("appendix", "Appendix", _appendix(data)),
    ]
    model = data.get("model") or {}
    title = f"{'Run' if watched else 'Model'}: {watched.get('name') or model.get('class') or 'model'}"
    return Document(title, _subtitle(data), sections, COLOURS, FOOTER)


FOOTER = "Made by normkit. Every number on this page was measured; how is in the appendix."


def _reading(row: Data) -> Reading:
    got = row["value"]
    got = tuple(got) if isinstance(got, list) else got
    return Reading(row["quantity"], got, row.get("module", ""), row.get("step"), row.get("unit", ""))


def _subtitle(data: Data) -> str:
    model = data.get("model") or {}
    told = [f"{model['parameters']} parameters"] if model.get("parameters") is not None else []
    told += [f"{model['norms']} norm layers"] if model.get("norms") is not None else []
    return f"{model.get('class', 'A model')}{': ' if told else ''}{listing(told)}"


def _strip(data: Data) -> list[str]:
    """What one wants to know before reading on."""
    counts = data.get("counts") or {}
    told = [f"{counts.get(kind, 0)} {kind}{'' if counts.get(kind, 0) == 1 else 's'}" for kind in COLOURS]
    lines = [listing(told)]
    if watched := data.get("run"):
        lines.append(f"{watched['steps']} steps, {watched['samples']} of them sampled")
        overhead = watched["overhead"]
        lines.append(
            f"watching added {share(overhead['share'])} to the training time: {overhead['sample_ms']:.3g} ms per "
            f"sample, {overhead['interval']} steps apart, {overhead['step_ms']:.3g} ms per step"
        )
    environment = data.get("environment") or {}
    where = [f"{key} {environment[key]}" for key in ("torch", "processor", "device", "commit") if environment.get(key)]
    return lines + ([", ".join(where)] if where else [])


def _appendix(data: Data) -> list[Block]:
    blocks: list[Block] = []
    if missing := data.get("not_asked"):
        rows = [[rule, reason] for rule, reason in missing.items()]
        blocks.append(Folded(f"{len(rows)} rules were not asked", [Table(["rule", "why"], rows)]))
    blocks += glossary(data.get("quantities") or {})
    for title, key in (("Environment", "environment"), ("The run", "run")):
        if rows := _rows(data.get(key)):
            blocks.append(Folded(title, [Table(["what", "value"], rows)]))
    blocks.append(_raw(data["readings"]))
    if model := (data.get("model") or {}).get("summary"):
        blocks.append(Folded("The model", [Code(model)]))
    blocks.append(Text("Cite: CITATION.cff of normkit.", "note"))
    return blocks


def _rows(found: Data | None) -> list[list[str]]:
    hidden = ("first_nan",)
    return [
        [key, got if isinstance(got, str) else json.dumps(got, ensure_ascii=False, default=str)]
        for key, got in (found or {}).items()
        if key not in hidden and got is not None
    ]


def _raw(readings: list[Data]) -> Folded:
    """The last readings: of a long run the page would otherwise be megabytes."""
    rows = [
        [
            row["quantity"],
            row.get("module", ""),
            "" if row.get("step") is None else str(row["step"]),
            ", ".join(map(str, row["value"])) if isinstance(row["value"], list) else value(row["value"]),
            row.get("unit", ""),
        ]
        for row in readings[-RAW:]
    ]
    title = f"{len(readings)} readings" + (f", the last {RAW} of them" if len(readings) > RAW else "")
    return Folded(title, [Table(["quantity", "where", "step", "value", "unit"], rows, numeric=frozenset({2, 3}))])
