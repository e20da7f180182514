"""``normkit explain RULE``: what a rule of the doctor finds, why it hurts, and when to leave it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from normkit.cli import arguments
from normkit.cli.output import show, show_json
from normkit.rules import RULES
from normkit.rules.rule import Rule
from normkit.watching.quantities import ALL


@dataclass
class ExplainRule:
    """What a rule of `normkit doctor` finds, why it hurts, and when to leave it."""

    rule: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RULE")]
    """A rule by its name."""
    json: bool = False
    """Print the same as JSON."""


def main(argv: list[str]) -> int:
    asked = arguments.parse(ExplainRule, argv, "explain")
    rule = RULES[asked.rule]
    if asked.json:
        show_json(plain(rule))
        return 0
    reads = [f"  {name}: {words(name)}" for name in sorted(rule.needs)]
    show(
        f"{rule.name}: {rule.finds}",
        f"why it hurts\n  {rule.means}",
        f"when to leave it\n  {rule.false_alarms}",
        "\n".join(["what it reads", *reads]),
        "\n".join(["references", *(f"  {reference}" for reference in rule.references)]),
        then=f"normkit doctor MODEL --select {rule.name}",
    )
    return 0


def words(quantity: str) -> str:
    """What a quantity is, in one line."""
    return ALL[quantity].formula


def plain(rule: Rule) -> dict[str, Any]:
    """The rule as plain data."""
    return {
        "name": rule.name,
        "finds": rule.finds,
        "means": rule.means,
        "false_alarms": rule.false_alarms,
        "reads": sorted(rule.needs),
        "references": list(rule.references),
    }
