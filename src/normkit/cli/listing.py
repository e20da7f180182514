"""``normkit list``: the norms, what each is invariant to, the backends, the tasks of compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table

from normkit import list_norms
from normkit.cli import arguments
from normkit.cli.output import show, show_json
from normkit.dispatch import BACKENDS
from normkit.lab.demonstrations import DEMONSTRATIONS
from normkit.lab.tasks import TASKS
from normkit.laws import LAWS
from normkit.vocabulary.spec import REGISTRY, attributes

HOLDS, BROKEN = "yes", "-"


@dataclass
class List:
    """The norms, what each is invariant to, the backends, the tasks of compare."""

    json: bool = False
    """Print the same as JSON."""


def main(argv: list[str]) -> int:
    asked = arguments.parse(List, argv, "list")
    norms = [attributes(REGISTRY[name].spec) for name in list_norms()]
    answer = f"{len(norms)} norms, {len(BACKENDS)} backends, {len(TASKS)} built-in tasks to compare them on"
    if asked.json:
        laws = {name: law.statement for name, law in LAWS.items()}
        names = {"backends": list(BACKENDS), "tasks": list(TASKS), "demonstrations": list(DEMONSTRATIONS)}
        show_json({"answer": answer, "norms": norms, "laws": laws, **names})
    else:
        show(
            answer,
            definitions(norms),
            "In training, the output of a layer does not depend on (yes), or depends on (-):",
            invariances(norms),
            statements(),
            f"backends        {', '.join(BACKENDS)}\n"
            f"tasks           {', '.join(TASKS)}\n"
            f"demonstrations  {', '.join(DEMONSTRATIONS)} (normkit compare {next(iter(DEMONSTRATIONS))})",
            then="normkit explain group --shape 8,64,56,56",
        )
    return 0


def definitions(norms: list[dict[str, Any]]) -> Table:
    """What each norm pools, what it replaces, and where it comes from. Brackets mark what shares its statistics."""
    table = Table("norm", "pools over", "centres", "drop-in for", "paper", box=None, padding=(0, 2, 0, 0))
    for norm in norms:
        twin = (norm["twin"] or "-").replace("{dim}", "1/2/3")
        table.add_row(norm["name"], norm["pools"], "yes" if norm["center"] else "no", twin, norm["paper"] or "-")
    return table


def invariances(norms: list[dict[str, Any]]) -> Table:
    """Norms down, laws across: a law that is not claimed is broken, and a test has the witness."""
    table = Table("norm", *LAWS, box=None, padding=(0, 2, 0, 0))
    for norm in norms:
        table.add_row(norm["name"], *(HOLDS if norm["laws"][law] else BROKEN for law in LAWS))
    return table


def statements() -> Table:
    """What each law says."""
    table = Table("law", "", box=None, padding=(0, 2, 0, 0))
    for name, law in LAWS.items():
        table.add_row(name, law.statement)
    return table
