"""Where an experiment ran: versions, processor, cores; nothing that names a machine or a person."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import normkit
from normkit.kernels import loading
from normkit.lab.parallel import Parallel, cores


def environment(parallel: Parallel) -> dict[str, Any]:
    """The key `environment` of experiment.json."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "normkit": normkit.__version__,
        "kernels": loading.module.isa() if loading.module else "torch",
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": cores(),
        "threads": parallel.threads,
        "workers": parallel.workers,
        "parallel": parallel.backend,
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def _commit() -> str | None:
    """The git commit of the working directory, with + when there are changes; None when it is no repository."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    quiet = dict(os.environ, GIT_OPTIONAL_LOCKS="0")
    result = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5, check=True, env=quiet)
    return result.stdout.strip()
