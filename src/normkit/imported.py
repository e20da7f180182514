"""From what a person types, ``file.py:function`` or ``package.module:function``, to the function."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any


def function(reference: str) -> Callable[..., Any]:
    """The function of that name.

    Raises:
        ValueError: no such file, module or function, or the file cannot be read; the message is for who typed it.
    """
    place, _, name = reference.rpartition(":")
    module = _file(Path(place).expanduser()) if place.endswith(".py") else _module(place)
    found = getattr(module, name, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        suggestion = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{place} has no function {name!r}{suggestion}; it has: {', '.join(known) or 'none'}")
    return found


def describe(error: Exception) -> str:
    """What a person's own code raised, and where: `KeyError: 'x' (exp.py, line 3)`."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError):
        where = f" ({Path(error.filename or '').name}, line {error.lineno})"
    return f"{type(error).__name__}: {error}{where}"


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and name.startswith(error.name):
            raise ValueError(
                f"no module {error.name!r}; give package.module:function or path/to/exp.py:function"
            ) from None
        raise ValueError(f"{name} imports {error.name!r}, which is not installed") from error
    except Exception as error:
        raise ValueError(f"importing {name} raised {describe(error)}") from error


@lru_cache(maxsize=8)
def _file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"no file {path}; give the path of a Python file and a function in it: exp.py:function")
    path = path.resolve()
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that classes of the file can be pickled
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # as `python exp.py` would: its neighbours can be imported
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"reading {path.name} raised {describe(error)}; correct the file") from error
    return module
