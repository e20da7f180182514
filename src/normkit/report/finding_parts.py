"""A finding as a part of the page: the claim, the number against its threshold, where, what to do, how to check."""

from __future__ import annotations

import math
from typing import Any

from normkit.report.document import Block, Code, Part, Text
from normkit.report.figures import drawn
from normkit.report.labels import listing, sentence
from normkit.vocabulary.evidence import Evidence

SAFETY = {
    "identical": "computes the same in training and in evaluation",
    "train_identical": "computes the same in training; evaluation changes",
    "eval_identical": "computes the same in evaluation; training changes",
    "retrain": "computes something else: train after it, and compare",
}
NAMED = 6
"""Modules that a finding lists; the rest is counted."""


def value(number: Any) -> str:
    """A measured value as text, whatever it is."""
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        return str(number)
    if not math.isfinite(number):
        return "NaN" if math.isnan(number) else ("∞" if number > 0 else "−∞")
    return f"{number:.4g}".replace("-", "−")


def parts(findings: list[dict[str, Any]], evidence: Evidence) -> list[Block]:
    """One part per finding, in the order given, which is worst first."""
    return [_part(index, finding, evidence) for index, finding in enumerate(findings)]


def _part(index: int, finding: dict[str, Any], evidence: Evidence) -> Part:
    blocks: list[Block] = [Text(f"{finding['severity']}: {finding['rule']}{_where(finding)}", "note")]
    blocks += [Text(told) for told in (_measured(finding),) if told]
    blocks += _sparkline(index, finding, evidence)
    for prescription in finding.get("prescriptions", ()):
        blocks += _prescription(prescription)
    for command in finding.get("experiments", ()):
        blocks += [Text("It changes what is computed. To try it first, on an experiment of yours:"), Code(command)]
    if finding.get("check"):
        blocks.append(Text(f"To check it: {finding['check']}", "note"))
    return Part(_capital(finding["claim"]), blocks, finding["severity"], f"finding-{index}")


def _where(finding: dict[str, Any]) -> str:
    modules = [module or "the model" for module in finding.get("modules", ())]
    more = f" and {len(modules) - NAMED} more" if len(modules) > NAMED else ""
    places = f", in {', '.join(modules[:NAMED])}{more}" if modules else ""
    return places + ("" if finding.get("step") is None else f", at step {finding['step']}")


def _measured(finding: dict[str, Any]) -> str:
    if finding.get("measured") is None:
        return ""
    told = f"Measured: {finding.get('quantity') or 'value'} {value(finding['measured'])}"
    if finding.get("threshold") is not None:
        told += f"; threshold {value(finding['threshold'])}"
    return told + (f" ({finding['source']})." if finding.get("source") else ".")


def _prescription(prescription: dict[str, Any]) -> list[Block]:
    action = prescription["action"] + (f": {prescription['detail']}" if prescription.get("detail") else "")
    code = prescription.get("code") or prescription.get("by_hand")
    told = [f"What to do: {sentence(action)[:1].lower()}{sentence(action)[1:]}"]
    told += [sentence(prescription["reason"])] if prescription.get("reason") else []
    told += [f"It {SAFETY[prescription['safety']]}."] if prescription.get("operation") else []
    return [Text(" ".join(told)), *([Code(code)] if code else [])]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _sparkline(index: int, finding: dict[str, Any], evidence: Evidence) -> list[Block]:
    """The quantity over the run where the finding lies first; nothing for fewer than three samples."""
    for module in finding.get("modules") or ("",):
        points = numbers(evidence, finding.get("quantity", ""), module)
        if len([v for _, v in points if math.isfinite(v)]) >= 3:
            threshold = finding.get("threshold")
            line = float(threshold) if isinstance(threshold, (int, float)) else None
            title = listing([w for w in (finding["quantity"].replace("_", " "), f"of {module}" if module else "") if w])
            title = title.replace(" and of ", " of ")
            return drawn("over_steps.sparkline", points, title, f"finding-{index}-line", line)
    return []


def numbers(evidence: Evidence, quantity: str, module: str) -> list[tuple[int, float]]:
    """(step, value) of every numeric reading that has a step."""
    readings = evidence.series(quantity, module)
    return [(r.step, float(r.value)) for r in readings if r.step is not None and isinstance(r.value, (int, float))]
