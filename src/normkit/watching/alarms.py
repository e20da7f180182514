"""Alarms: the rules are asked at every sample, and what is new is said at once."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from normkit.diagnosis import Diagnosis
from normkit.rules import RULES
from normkit.vocabulary.finding import SEVERITIES, Finding
from normkit.vocabulary.reading import Reading

log = logging.getLogger("normkit.watch")
WINDOW = 16
"""The last samples, which the rules see while the run goes on."""
LEVELS = {"error": logging.ERROR, "warning": logging.WARNING, "note": logging.INFO}


class Alarms:
    """Each rule speaks once per run, and again when it has got worse.

    Args:
        lacking: quantities that nobody measures, and what that would take.
    """

    def __init__(self, lacking: Mapping[str, str]) -> None:
        self.lacking = lacking
        self.structure: tuple[Reading, ...] = ()
        """What stands in the model and does not change from step to step."""
        self.lost: tuple[Reading, ...] = ()
        """The first NaN, once there is one."""
        self._window: deque[list[Reading]] = deque(maxlen=WINDOW)
        self._said: dict[str, int] = {}

    @property
    def recent(self) -> list[Reading]:
        """The readings of the last samples."""
        return [reading for sample in self._window for reading in sample]

    def hear(self, readings: Iterable[Reading], model: Mapping[str, Any]) -> Iterator[Finding]:
        """The findings that are new with this sample, which may be empty."""
        self._window.append(list(readings))
        try:
            found = Diagnosis.of_readings(
                [*self.structure, *self.lost, *self.recent], model, lacking=self.lacking
            ).findings
        except Exception:  # a rule that fails must not end a training
            log.warning("the rules could not be asked at this sample (%d rules)", len(RULES), exc_info=True)
            return
        yield from (finding for finding in found if self.is_new(finding))

    def is_new(self, finding: Finding) -> bool:
        """Whether it has not been said, or not this badly."""
        rank = SEVERITIES.index(finding.severity)
        if self._said.get(finding.rule, len(SEVERITIES)) <= rank:
            return False
        self._said[finding.rule] = rank
        return True


def say(finding: Finding, step: int) -> None:
    """To the log ``normkit.watch``."""
    log.log(LEVELS[finding.severity], "step %d: %s (%s)", step, finding.claim, finding.rule)
