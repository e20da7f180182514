"""From what a person types (`digits`, `exp.py:function`, `package.module:function`) to an `Experiment`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from normkit.lab.errors import LabError, nearest
from normkit.lab.experiment import Experiment
from normkit.lab.tasks import TASKS


@dataclass(frozen=True, eq=False)
class InMemory:
    """A function without options that returns an experiment which exists already."""

    experiment: Experiment

    def __call__(self) -> Experiment:
        return self.experiment


@dataclass(frozen=True)
class Source:
    """Where an experiment comes from; small and picklable, so that every worker loads it for itself.

    reference: a built-in task, `file.py:function` or `package.module:function`; function: an experiment that exists
    in memory only (the Python interface), or a function that returns one.
    """

    reference: str
    function: Callable[..., Experiment] | None = None

    def load(self, options: Mapping[str, Any]) -> Experiment:
        """The experiment for these options; LabError when there is none, or when it takes no such option."""
        for name, value in options.items():
            if not isinstance(value, (bool, int, float, str)):
                raise LabError(f"option {name}={value!r}: give a number, a word or true or false")
        return _load(self.reference, self.function, tuple(sorted(options.items())))

    def code(self) -> str:
        """Fingerprint of the source file that defines the experiment; built-in tasks: the version of normkit.

        A changed experiment is another experiment: its old results must not be taken for its new ones.
        """
        function = self.function or _resolve(self.reference)
        if isinstance(function, InMemory):
            function = function.experiment.model
        if (function.__module__ or "").split(".")[0] == "normkit":
            import normkit

            return f"normkit {normkit.__version__}"
        return hashlib.sha256(_source_code(function).encode()).hexdigest()[:16]

    def options(self) -> dict[str, Any]:
        """The options the experiment's function takes, with their defaults."""
        parameters = inspect.signature(self.function or _resolve(self.reference)).parameters.values()
        return {p.name: p.default for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


@lru_cache(maxsize=4)
def _load(
    reference: str, function: Callable[..., Experiment] | None, options: tuple[tuple[str, Any], ...]
) -> Experiment:
    build = function or _resolve(reference)
    _check_options(reference, build, dict(options))
    try:
        experiment = build(**dict(options))
    except LabError:
        raise
    except Exception as error:
        raise LabError(
            f"{reference} raised {describe(error)}; correct the function that makes the experiment"
        ) from error
    if not isinstance(experiment, Experiment):
        raise LabError(
            f"{reference} returned {type(experiment).__name__}; expected a normkit.lab.Experiment (see docs/compare.md)"
        )
    return experiment


def _check_options(reference: str, build: Callable[..., Any], options: dict[str, Any]) -> None:
    parameters = inspect.signature(build).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for name in options:
        if name not in parameters:
            known = ", ".join(parameters) or "none"
            raise LabError(f"{reference} takes no option {name!r}{nearest(name, parameters)}; it takes: {known}")


def _resolve(reference: str) -> Callable[..., Any]:
    if ":" not in reference:
        if reference not in TASKS:
            raise LabError(
                f"unknown task {reference!r}{nearest(reference, TASKS)}; built-in tasks: {', '.join(TASKS)}; your own "
                "experiment is exp.py:function or package.module:function"
            )
        reference = TASKS[reference]
    place, _, name = reference.rpartition(":")
    module = _file(Path(place).expanduser()) if place.endswith(".py") else _module(place)
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise LabError(f"{place} has no function {name!r}{nearest(name, known)}; it has: {', '.join(known) or 'none'}")
    return function


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and name.startswith(error.name):
            raise LabError(
                f"no module {error.name!r}; give package.module:function or path/to/exp.py:function"
            ) from None
        raise LabError(f"{name} imports {error.name!r}, which is not installed") from error
    except Exception as error:
        raise LabError(f"importing {name} raised {describe(error)}") from error


@lru_cache(maxsize=8)
def _file(path: Path) -> ModuleType:
    if not path.is_file():
        raise LabError(f"no file {path}; give the path of a Python file and a function in it: exp.py:function")
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
        raise LabError(f"reading {path.name} raised {describe(error)}; correct the file") from error
    return module


def _source_code(function: Callable[..., Any]) -> str:
    """The file that defines a function; what is typed into a session has only itself, or not even that."""
    for thing in (inspect.getmodule(function), function):
        try:
            return inspect.getsource(thing)  # type: ignore[arg-type]
        except (OSError, TypeError):
            continue
    return getattr(function, "__qualname__", type(function).__qualname__)


def describe(error: Exception) -> str:
    """What a person's own code raised, and where: `KeyError: 'x' (exp.py, line 3)`."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError):
        where = f" ({Path(error.filename or '').name}, line {error.lineno})"
    return f"{type(error).__name__}: {error}{where}"
