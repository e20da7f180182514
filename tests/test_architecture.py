"""Who may import whom, what an import costs, and what things are called: the shape of the library, enforced."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import normkit

ROOT = Path(normkit.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

NEVER = {  # rooms -> what no file in them imports
    ("kernels",): {"norms", "norm", "statistics", "vocabulary.spec"},
    ("norms", "statistics"): {"kernels"},
    ("rules",): {"surgery", "strategies"},
    ("strategies",): {"surgery", "rules"},
    ("surgery",): {"rules"},
}
ONLY = {  # rooms -> the only things outside the standard library that a file in them imports
    ("vocabulary",): {"normkit.vocabulary"},
    ("report",): {"normkit.report", "normkit.vocabulary", "matplotlib"},
    ("rules",): {"normkit.rules", "normkit.vocabulary"},
}
ONLY_BY_CLI = {"lab", "bench", "claims"}
PUBLIC_LAZY = ("", "lab")  # `nk.lab`: the package names it and loads it on first use
FORBIDDEN_NAMES = {"utils", "helpers", "common", "manager", "base", "misc"}


def module_of(path: Path) -> str:
    """``norms/rms_norm.py`` -> ``norms.rms_norm``; the package's own ``__init__.py`` -> the empty string."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(source: str, module: str, *, package: bool) -> Iterator[str]:
    """Every absolute name that the source imports, wherever in it, relative imports resolved."""
    home = ["normkit", *filter(None, module.split("."))]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = home[: len(home) - node.level + package] if node.level else []
            origin = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def objections(source: str, module: str, *, package: bool = False) -> list[str]:
    """One sentence for every import that the architecture forbids."""
    found = []
    room = module.partition(".")[0]
    for name in imports(source, module, package=package):
        ours = name.removeprefix("normkit.") if within(name, "normkit") else ""
        target = ours.partition(".")[0]
        for rooms, banned in NEVER.items():
            if room in rooms and any(within(ours, other) for other in banned):
                found.append(f"{module} imports {name}: {room} never imports {sorted(banned)}")
        for rooms, allowed in ONLY.items():
            standard = name.partition(".")[0] in sys.stdlib_module_names
            if room in rooms and not standard and not any(within(name, other) for other in allowed):
                found.append(f"{module} imports {name}: {room} imports only the standard library and {sorted(allowed)}")
        if target in ONLY_BY_CLI and room not in ("cli", target) and (module, target) != PUBLIC_LAZY:
            found.append(f"{module} imports {name}: only cli imports {sorted(ONLY_BY_CLI)}")
        if target == "cli" and room not in ("cli", "__main__"):
            found.append(f"{module} imports {name}: nothing imports cli")
        if within(name, "tests"):
            found.append(f"{module} imports {name}: nothing imports tests")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_architecture(path):
    assert objections(path.read_text(), module_of(path), package=path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vocabulary.spec", "import torch"),
        ("vocabulary.spec", "import normkit"),
        ("report.page", "def f():\n    import torch.nn"),
        ("report.page", "from normkit import lab"),
        ("report.page", "from ..lab import analyse"),
        ("kernels.cpu", "from normkit.vocabulary import spec"),
        ("kernels.cpu", "from normkit.norm import Norm"),
        ("norms.rms_norm", "from normkit.kernels import cpu"),
        ("statistics.ghost", "from ..kernels.cpu import moments"),
        ("rules.stale", "import normkit.strategies.warmup"),
        ("rules.stale", "import torch"),
        ("rules.stale", "from normkit.measure import measure"),
        ("strategies.warmup", "from normkit.surgery import operate"),
        ("surgery.operate", "from normkit import rules"),
        ("dispatch", "from normkit.lab import run"),
        ("lab.run", "from normkit.bench import cases"),
        ("lab.run", "from normkit.cli.errors import UserError"),
        ("norm", "from tests.oracle import assert_matches"),
    ],
)
def test_a_forbidden_import_is_seen(module, source):
    assert objections(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vocabulary.problem", "import math\nfrom normkit.vocabulary.spec import Spec"),
        ("report.page", "from matplotlib.figure import Figure\nfrom . import plots"),
        ("kernels.cpu", "from normkit.vocabulary.problem import Problem"),
        ("cli.compare", "from normkit.lab import run"),
        ("lab.run", "from normkit.lab import train\nimport normkit as nk"),
        ("", "from normkit import lab"),
    ],
)
def test_an_allowed_import_is_not_objected_to(module, source):
    assert objections(source, module, package=module == "") == []


def test_every_norm_has_its_line_in_the_menu():
    menu = ROOT / "norms" / "__init__.py"
    listed = {
        name.split(".")[2] for name in imports(menu.read_text(), "norms", package=True) if within(name, "normkit.norms")
    }
    assert {path.stem for path in menu.parent.glob("*.py")} - {"__init__"} == listed


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_of_files_say_what_is_in_them(path):
    assert FORBIDDEN_NAMES.isdisjoint(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_command_line_prints(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    printing = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert not printing or module_of(path).startswith("cli")


NETWORK = {"socket", "ssl", "http", "urllib", "ftplib", "smtplib", "asyncio", "requests", "urllib3", "httpx", "aiohttp"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_opens_a_connection(path):
    names = imports(path.read_text(), module_of(path), package=path.name == "__init__.py")
    assert NETWORK.isdisjoint(name.partition(".")[0] for name in names)


def test_public_names_are_sorted_and_complete():
    ours = {name for name, value in vars(normkit).items() if getattr(value, "__module__", "").startswith("normkit.")}
    assert list(normkit.__all__) == sorted(normkit.__all__)
    assert {name for name in ours if not name.startswith("_")} <= set(normkit.__all__)
    assert {*normkit.__all__} <= {*dir(normkit)}
    assert all(hasattr(normkit, name) for name in normkit.__all__)
    assert not hasattr(normkit, "no_such_name")


IMPORT = """
import sys, torch
from torch.utils._python_dispatch import TorchDispatchMode

before, done = set(sys.modules), []

class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        done.append(f"ran {operator}")
        return operator(*args, **(kwargs or {}))

def audit(event, arguments):
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if writes or event in ("subprocess.Popen", "os.system", "socket.connect", "_thread.start_new_thread"):
        done.append(f"{event} {arguments}")

sys.addaudithook(audit)
with Watch():
    import normkit
new = set(sys.modules) - before
origins = {name.partition(".")[0] for name in new} - sys.stdlib_module_names
rooms = {".".join(name.split(".")[:2]) for name in new}
print(*sorted(origins - {"torch", "normkit"}), *sorted(rooms & {"normkit." + room for room in LATER}), *done)
"""
LATER = ("bench", "claims", "cli", "fusion", "integrations", "lab", "measure", "report", "rules", "surgery", "watching")
"""Rooms that layers do without: each would cost everybody milliseconds at every import."""


def test_importing_normkit_loads_nothing_heavy_and_does_no_work():
    source = f"LATER = {LATER}\n{IMPORT}"
    command = [sys.executable, "-B", "-c", source]  # -B: writing bytecode is Python's doing, not ours
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
