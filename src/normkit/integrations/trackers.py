"""Whatever logs: anything with ``.log(dict, step=)`` or ``.add_scalar(name, value, step)``. Nothing is imported.

Runs of Weights & Biases and trackio have the first, TensorBoard's ``SummaryWriter`` the second; a module (``wandb``)
that has the function is as good as an object.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from normkit.vocabulary.finding import Finding

log = logging.getLogger(__name__)
PREFIX = "norm"


class Trackers:
    """All of them. One that raises is told no more, and the training goes on.

    Args:
        trackers: the objects.

    Raises:
        TypeError: one can do neither.
    """

    def __init__(self, trackers: Iterable[Any]) -> None:
        self.all = list(trackers)
        for tracker in self.all:
            if not callable(getattr(tracker, "log", None)) and not callable(getattr(tracker, "add_scalar", None)):
                raise TypeError(
                    f"trackers: a {type(tracker).__name__} has neither .log(dict, step=) nor .add_scalar(name, value, "
                    "step).\n  give a run of Weights & Biases or trackio, TensorBoard's SummaryWriter, or an object "
                    "with one of the two"
                )

    def values(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by name."""
        self._tell(lambda tracker: _values(tracker, values, step))

    def finding(self, finding: Finding, step: int) -> None:
        """An alarm: as an alert or a text where the tracker knows such a thing, and as the number 1 elsewhere."""
        self._tell(lambda tracker: _finding(tracker, finding, step))

    def _tell(self, tell: Any) -> None:
        for tracker in list(self.all):
            try:
                tell(tracker)
            except Exception:
                self.all.remove(tracker)
                log.warning(
                    "%s failed, and is told no more; the training goes on", type(tracker).__name__, exc_info=True
                )


def _values(tracker: Any, values: Mapping[str, float], step: int) -> None:
    if callable(getattr(tracker, "log", None)):
        tracker.log(dict(values), step=step)
    else:
        for name, value in values.items():
            tracker.add_scalar(name, value, step)


def _finding(tracker: Any, finding: Finding, step: int) -> None:
    if callable(getattr(tracker, "alert", None)):
        tracker.alert(title=f"{finding.severity}: {finding.rule}", text=finding.claim)
    elif callable(getattr(tracker, "add_text", None)):
        tracker.add_text(f"{PREFIX}/findings", f"**{finding.severity}: {finding.rule}** {finding.claim}", step)
    else:
        _values(tracker, {f"{PREFIX}/findings/{finding.rule}": 1.0}, step)
