"""Finds the compiled kernels, or says why there are none."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch  # before the kernels: both then share one OpenMP pool, and torch.set_num_threads counts for both


def _load() -> tuple[Any, str | None]:
    if os.environ.get("NORMKIT_NATIVE") == "0":
        return None, "NORMKIT_NATIVE=0 switches the compiled kernels off"
    try:
        return importlib.import_module("normkit.kernels._native"), None
    except ImportError as error:
        return None, (
            f"the compiled kernels are not there ({error}); install normkit where there is a C++ compiler with OpenMP"
        )


module, absence = _load()
"""The compiled module, or ``None`` and the reason."""
has_avx512 = module is not None and str(module.isa()).startswith("avx512")
"""Whether the kernels use it."""


def describe() -> str:
    """One line about the compiled kernels: for ``normkit env``."""
    if module is None:
        return f"none: {absence}"
    return f"{module.isa()}, {torch.get_num_threads()} threads"
