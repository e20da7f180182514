"""The one error of the lab: something that was asked cannot be done, and the message says what to do instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LabError(ValueError):
    """A mistake in what was asked (task, arm, file, option): the message is for the person who typed it."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'batch'?` when a known word is close to the one typed, otherwise nothing."""
    matches = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def missing_extra(package: str, extra: str, why: str) -> LabError:
    """The error for an optional dependency that is not installed: it names the one line to type."""
    return LabError(f'{why} needs {package}, which is not installed; type: pip install "normkit[{extra}]"')
