"""Strategy: a rule that runs during training. It reads what is measured and prescribes; surgery carries it out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn, optim

from normkit.strategies.coupling import KEEP, Coupling
from normkit.strategies.trigger import At, Moment, State, Trigger, parse
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.prescription import Prescription


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """Plain data. What it remembers is the state that :meth:`init` makes and :meth:`update` changes.

    Args:
        modules: names of the layers it is for; empty: all that the operation finds.
        coupling: what happens to the step size when it has switched.
    """

    modules: tuple[str, ...] = ()
    coupling: Coupling = KEEP

    @property
    def triggers(self) -> tuple[Trigger, ...]:
        """When it acts."""
        return ()

    @property
    def needs(self) -> frozenset[str]:
        """The quantities that have to be measured for it."""
        return frozenset().union(*(trigger.needs for trigger in self.triggers))

    def init(self, model: nn.Module, optimizer: optim.Optimizer | None = None) -> State:
        """The state before the first step. Raises ValueError where the model gives it nothing to do."""
        known = {name for name, _ in model.named_modules()}
        if missing := [name for name in self.modules if name not in known]:
            raise ValueError(f"{self}: the model has no module {missing[0]!r}; names are those of named_modules()")
        return {"done": False}

    def check(self, moment: Moment) -> None:
        """Raises ValueError where a point of training is not known in steps; ``moment`` has what is known."""
        for trigger in self.triggers:
            if isinstance(trigger, At):
                trigger.steps(moment)

    def update(self, state: State, moment: Moment, evidence: Evidence) -> list[Prescription]:
        """What shall be done now, after this step; most often nothing. ``state`` changes in place.

        It is a pure function of its arguments: every process that is given the same does the same.
        """
        raise NotImplementedError

    def coupled(self, state: State) -> Coupling:
        """What happens to the step size, now that what :meth:`update` gave has been carried out."""
        return self.coupling

    def prescribe(
        self, action: str, reason: str, operation: str, safety: Any = "retrain", **options: Any
    ) -> list[Prescription]:
        """One prescription for each module, or one for the model."""
        pairs = tuple(options.items())
        return [
            Prescription(action, name, reason, safety, operation=operation, options=pairs)
            for name in self.modules or ("",)
        ]


@dataclass(frozen=True)
class Once(Strategy):
    """Something is done once, when it is time. Args: ``at``: a trigger, or how it is written."""

    at: Trigger | str | float

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", parse(self.at))

    @property
    def triggers(self) -> tuple[Trigger, ...]:
        return (parse(self.at),)

    def update(self, state: State, moment: Moment, evidence: Evidence) -> list[Prescription]:
        if state["done"] or not self.triggers[0].due(state, moment, evidence):
            return []
        state["done"] = True
        return self.now(evidence)

    def now(self, evidence: Evidence) -> list[Prescription]:
        """What is done."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Ramp(Strategy):
    """Something goes from one value to another between two points of training, in a number of small steps."""

    start: At | str | float = 0
    end: At | str | float = "100%"
    increments: int = 20

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            point = parse(getattr(self, name))
            if not isinstance(point, At):
                raise ValueError(
                    f"{type(self).__name__}: {name}={point} is measured; a ramp runs between two points, as 20% and 60%"
                )
            object.__setattr__(self, name, point)
        if self.increments < 1:
            raise ValueError(f"{type(self).__name__}: increments={self.increments}; it takes 1 or more")

    @property
    def triggers(self) -> tuple[At, At]:
        assert isinstance(self.start, At)
        assert isinstance(self.end, At)
        return self.start, self.end

    def init(self, model: nn.Module, optimizer: optim.Optimizer | None = None) -> State:
        return {**super().init(model, optimizer), "at": -1}

    def check(self, moment: Moment) -> None:
        first, last = (point.steps(moment) for point in self.triggers)
        if last <= first:
            raise ValueError(f"{type(self).__name__}: it ends at step {last}, and starts at {first}")

    def update(self, state: State, moment: Moment, evidence: Evidence) -> list[Prescription]:
        first, last = (point.steps(moment) for point in self.triggers)
        if state["done"] or moment.step < first:
            return []
        at = min(self.increments, int(self.increments * (moment.step - first) / (last - first)))
        if at == state["at"]:
            return []
        state["at"], state["done"] = at, at == self.increments
        return self.at(at / self.increments)

    def coupled(self, state: State) -> Coupling:
        return self.coupling if state["done"] else KEEP

    def at(self, share: float) -> list[Prescription]:
        """What is done when this share of the way is behind; 1: at its end."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Phases(Strategy):
    """One strategy after the other: the next begins when the one before is done."""

    phases: tuple[Strategy, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.phases:
            raise ValueError("Phases: there are none; give one or more strategies")

    @property
    def triggers(self) -> tuple[Trigger, ...]:
        return tuple(trigger for phase in self.phases for trigger in phase.triggers)

    def init(self, model: nn.Module, optimizer: optim.Optimizer | None = None) -> State:
        return {
            "done": False,
            "phase": 0,
            "spoke": 0,
            "states": [phase.init(model, optimizer) for phase in self.phases],
        }

    def coupled(self, state: State) -> Coupling:
        spoke = state["spoke"]
        return self.phases[spoke].coupled(state["states"][spoke])

    def update(self, state: State, moment: Moment, evidence: Evidence) -> list[Prescription]:
        if state["done"]:
            return []
        place = state["spoke"] = state["phase"]
        found = self.phases[place].update(state["states"][place], moment, evidence)
        if state["states"][place]["done"]:
            state["phase"] = place + 1
            state["done"] = state["phase"] == len(self.phases)
        return found

    def __str__(self) -> str:
        return " -> ".join(map(str, self.phases))


def flattened(strategy: Strategy) -> Iterator[Strategy]:
    """The strategy, or those it consists of."""
    if isinstance(strategy, Phases):
        for phase in strategy.phases:
            yield from flattened(phase)
    else:
        yield strategy
