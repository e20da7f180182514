"""``normkit env``: versions and hardware, what a bug report needs. No path, no host name, no user name."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import normkit
from normkit.cli import arguments
from normkit.cli.errors import EXTRAS
from normkit.cli.output import show, show_json
from normkit.dispatch import BACKENDS
from normkit.kernels import loading

DISTRIBUTIONS = {"sklearn": "scikit-learn"}
"""Where a module and the package that brings it have different names."""


@dataclass
class Environment:
    """Versions and hardware: what a bug report needs."""

    json: bool = False
    """Print the same as JSON."""


def main(argv: list[str]) -> int:
    asked = arguments.parse(Environment, argv, "env")
    facts = {"software": software(), "processor": processor(), "kernels": kernels(), "gpus": gpus(), "extras": extras()}
    if asked.json:
        show_json({"answer": answer(facts), **facts})
    else:
        show(answer(facts), table(facts), then="normkit list")
    return 0


def answer(facts: dict[str, Any]) -> str:
    """The environment in one sentence."""
    software, count = facts["software"], len(facts["gpus"])
    return (
        f"normkit {software['normkit']} with torch {software['torch']}: {facts['processor']['usable cores']} cores, "
        f"{count or 'no'} GPU{'s' if count > 1 else ''}, backends {', '.join(facts['kernels']['backends'])}"
    )


def software() -> dict[str, str]:
    """Versions, by name of the software."""
    return {
        "normkit": normkit.__version__,
        "torch": torch.__version__,
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": platform.platform(),
        **{name: version(name) for name in ("triton", "numpy", "tyro", "rich")},
    }


def version(distribution: str) -> str:
    """The installed version of a package, or ``not installed``."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def processor() -> dict[str, Any]:
    """What the processor is, and how much of it this process may use."""
    return {
        "processor": cpu_model(),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "usable cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads of torch": torch.get_num_threads(),
        "threads between operators": torch.get_num_interop_threads(),
        "OpenMP": openmp(),
        **{name: os.environ.get(name, "not set") for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")},
    }


def cpu_model() -> str:
    """The processor's name as Linux gives it; the architecture elsewhere."""
    listing = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", listing.read_text(), re.MULTILINE) if listing.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()


def openmp() -> str:
    """The OpenMP that torch was built with."""
    if not torch.backends.openmp.is_available():
        return "absent"
    found = re.search(r"a\.k\.a\. OpenMP ([\d.]+)", torch.__config__.show())
    return found[1] if found else "present"


def kernels() -> dict[str, Any]:
    """The backends of this installation, and whether there is a compiler."""
    return {
        "backends": list(BACKENDS),
        "compiled kernels": loading.describe(),
        "C++ compiler": compiler(),
    }


def compiler() -> str:
    """The first line of the C++ compiler's ``--version``."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            result = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
            if result.stdout:
                return result.stdout.splitlines()[0]
    return "not found"


def gpus() -> list[str]:
    """Name, compute capability and memory of each GPU that torch can use."""
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        found.append(f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB")
    return found


def extras() -> dict[str, dict[str, str]]:
    """Per extra, the version of each of its packages."""
    listing: dict[str, dict[str, str]] = {}
    for module, extra in EXTRAS.items():
        name = DISTRIBUTIONS.get(module, module)
        listing.setdefault(extra, {})[name] = version(name)
    return listing


def table(facts: dict[str, Any]) -> Table:
    """All facts, two columns."""
    grid = Table.grid(padding=(0, 3))
    for group in ("software", "processor", "kernels"):
        for name, value in facts[group].items():
            grid.add_row(name, ", ".join(value) if isinstance(value, list) else str(value))
        grid.add_row()
    grid.add_row("GPUs", "\n".join(facts["gpus"]) or "none that torch can use")
    for extra, packages in facts["extras"].items():
        grid.add_row(f"extra {extra}", ", ".join(f"{name} {version}" for name, version in packages.items()))
    return grid
