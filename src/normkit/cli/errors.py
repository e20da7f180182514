"""What the command line says when the user, and not normkit, has to do something."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

EXTRAS = {
    "numpy": "lab",
    "sklearn": "lab",
    "scipy": "lab",
    "matplotlib": "lab",
    "joblib": "lab",
    "safetensors": "export",
    "dask": "dask",
    "distributed": "dask",
    "ray": "ray",
}
"""The extra that brings a module in."""


class UserError(Exception):
    """Something the user typed, or a file the user gave: its message says what, why not, and what to do."""


@contextlib.contextmanager
def from_user() -> Iterator[None]:
    """Take the library's own refusals inside the ``with`` for answers to what the user typed.

    Around the call that first meets the user's words, and nothing more: a ValueError from elsewhere is a fault of ours
    and should keep its traceback.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise UserError(str(error)) from error


def require(*modules: str) -> None:
    """Before any work, for modules that are wanted only at its end.

    Raises:
        ModuleNotFoundError: one of them is not installed; :func:`missing_extra` has the words.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)


def missing_extra(error: ModuleNotFoundError, command: str) -> str | None:
    """The one line to type when a module of an extra is missing; ``None`` for any other module."""
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS:
        return None
    return f'{command} needs {module}, which is not installed.\n  type: pip install "normkit[{EXTRAS[module]}]"'
