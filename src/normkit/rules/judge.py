"""judge: every rule is asked about the evidence, or it is said why not."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Collection, Iterable, Mapping

from normkit.rules.rule import Rule
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding, worst_first
from normkit.vocabulary.reading import Reading


def judge(
    rules: Iterable[Rule], evidence: Evidence, lacking: Mapping[str, str]
) -> tuple[tuple[Finding, ...], dict[str, str]]:
    """Findings, worst first, and the rules that were not asked, with the reason.

    Args:
        rules: in the order in which equals are told.
        evidence: all that was read.
        lacking: quantities that nobody has tried to measure, each with what that takes. A rule that needs none of them
            is asked, also where nothing of the kind is in the model: it then has nothing to say.
    """
    findings: list[Finding] = []
    sound = before_the_first_nan(evidence)
    not_asked: dict[str, str] = {}
    for rule in rules:
        absent = [need for need in sorted(rule.needs) if need in lacking and need not in evidence]
        if absent:
            not_asked[rule.name] = f"{absent[0]} was not measured; it takes {lacking[absent[0]]}"
        else:
            findings += rule.find(evidence if rule.after_nan else sound)
    return worst_first(findings), not_asked


def before_the_first_nan(evidence: Evidence) -> Evidence:
    """What was read before a value that is not finite got into the model; all of it, where there was none.

    A spike before it may be what led to it and is told; the loss that is NaN ever after is not a second finding.
    """
    lost = [r for q in ("first_nan", "parameter_nonfinite", "gradient_nonfinite") for r in evidence.of(q) if _bad(r)]
    spoilt = any(reading.quantity == "parameter_nonfinite" for reading in lost)
    first = min((reading.step for reading in lost if reading.step is not None), default=None)
    if first is None and not spoilt:
        return evidence
    return Evidence(
        reading
        for reading in evidence.readings
        if (first is None or reading.step is None or reading.step < first)
        and not (isinstance(reading.value, float) and not math.isfinite(reading.value))
    )


def _bad(reading: Reading) -> bool:
    return isinstance(reading.value, str) or (isinstance(reading.value, float) and reading.value > 0)


def chosen(
    rules: Iterable[Rule], select: Collection[str] | str | None, ignore: Collection[str] | str | None
) -> list[Rule]:
    """The rules of that name, or whose name fits a pattern (``statistics_*``).

    Raises:
        ValueError: a name or pattern that fits no rule; the message names the nearest.
    """
    everything = {rule.name: rule for rule in rules}
    wanted = _fitting(everything, select) if select else set(everything)
    return [rule for name, rule in everything.items() if name in wanted - _fitting(everything, ignore)]


def _fitting(rules: Mapping[str, Rule], words: Collection[str] | str | None) -> set[str]:
    found: set[str] = set()
    for word in [words] if isinstance(words, str) else words or ():
        fitting = fnmatch.filter(rules, word)
        if not fitting:
            near = difflib.get_close_matches(word, rules, n=1, cutoff=0.4)
            suggestion = f"  did you mean {near[0]!r}?\n" if near else ""
            raise ValueError(f"there is no rule {word!r}.\n{suggestion}  choose from: {', '.join(rules)}")
        found |= set(fitting)
    return found
