"""Select: switchable norms choose for themselves, and are held to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from normkit.strategies.strategy import Strategy
from normkit.strategies.trigger import Measured, Moment, State, Trigger, parse
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.prescription import Prescription


@dataclass(frozen=True)
class Select(Strategy):
    """A switchable norm becomes the norm that it weights most, once that one's share is great, or at the latest ``at``.

    Args:
        at: when all that are left are held to what they weight most.
        share: of the leading norm (the smaller of its shares in mean and variance) from which a layer is settled.

    >>> from normkit.strategies import Select
    >>> print(Select("60%"))
    select@60%

    Source: the weights are Luo et al. 2018, arXiv:1806.10779; sparse ones are Shao et al. 2019, arXiv:1903.03793.
    """

    at: Trigger | str | float
    share: float = 0.8

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", parse(self.at))
        if not 1 / 3 < self.share <= 1:
            raise ValueError(f"Select: share={self.share}; it is above 1/3, and at most 1")

    @property
    def triggers(self) -> tuple[Trigger, ...]:
        return parse(self.at), Measured("switchable_share", self.share, below=False)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"switchable_share", "switchable_choice"}) | self.triggers[0].needs

    def init(self, model: Any, optimizer: Any = None) -> State:
        return {**super().init(model, optimizer), "settled": []}

    def update(self, state: State, moment: Moment, evidence: Evidence) -> list[Prescription]:
        last = self.triggers[0].due(state, moment, evidence)
        if state["done"]:
            return []
        state["done"] = last
        found = []
        for name, share in evidence.numbers("switchable_share"):
            wanted = not self.modules or name in self.modules
            if wanted and name not in state["settled"] and (last or share >= self.share):
                state["settled"].append(name)
                kind = evidence.word("switchable_choice", name)
                reason = f"{kind} norm has {share:.0%} of its weights"
                found.append(
                    Prescription(
                        f"becomes {kind} norm", name, reason, "retrain", operation="convert_", options=(("to", kind),)
                    )
                )
        return found

    def __str__(self) -> str:
        return f"select@{self.at} {self.coupling}".strip()
