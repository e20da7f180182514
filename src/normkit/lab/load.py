"""From what a person types (`digits`, `exp.py:function`, `package.module:function`) to an `Experiment`."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from normkit import imported
from normkit.imported import describe
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
    try:
        return imported.function(reference)
    except ValueError as error:
        raise LabError(str(error)) from error.__cause__


def _source_code(function: Callable[..., Any]) -> str:
    """The file that defines a function; what is typed into a session has only itself, or not even that."""
    for thing in (inspect.getmodule(function), function):
        try:
            return inspect.getsource(thing)  # type: ignore[arg-type]
        except (OSError, TypeError):
            continue
    return getattr(function, "__qualname__", type(function).__qualname__)
