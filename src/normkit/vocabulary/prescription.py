"""Prescription: one proposed change of a model, with its reason and its safety."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Safety = Literal["identical", "train_identical", "eval_identical", "retrain"]

MEANING: dict[Safety, str] = {
    "identical": "the same function in training and in evaluation, up to rounding",
    "train_identical": "the same function in training; evaluation differs",
    "eval_identical": "the same function in evaluation; training differs",
    "retrain": "another function: the model needs training after it",
}
"""What each safety promises. Surgery holds the first three against a probe batch."""

_WANTS = {"calibrate_": ("loader",)}
"""What a person has to hand to an operation beside the model."""


@dataclass(frozen=True, slots=True)
class Prescription:
    """What shall be done to one module, and why."""

    action: str
    """What is done, in the words by which a certificate counts: ``"BatchNorm2d becomes normkit's"``."""
    module: str
    """The module's name in the model; empty: the model itself."""
    reason: str
    safety: Safety = "identical"
    detail: str = ""
    """What exactly, where the action has parts."""
    operation: str = ""
    """The operation of :mod:`normkit.surgery` that carries it out, by name; empty: a person has to."""
    options: tuple[tuple[str, Any], ...] = ()
    """Its keyword arguments, as pairs: plain data."""
    by_hand: str = ""
    """Code for a person, where no operation does it."""
    arms: str = ""
    """Arms of ``normkit compare`` that try it before anything is decided, where arms can say it."""

    def __post_init__(self) -> None:
        if self.safety not in MEANING:
            raise ValueError(f"safety {self.safety!r} is unknown.\n  choose from: {', '.join(MEANING)}")
        if self.operation and self.by_hand:
            raise ValueError(f"prescription {self.action!r}: by operation {self.operation!r} or by hand, not both")

    @property
    def code(self) -> str:
        """What to type."""
        if not self.operation:
            return self.by_hand
        words = [*_WANTS.get(self.operation, ()), *(f"{name}={value!r}" for name, value in self.options)]
        if self.module:
            words.append(f"filter_fn=lambda module, name: name == {self.module!r}")
        return f"nk.{self.operation}({', '.join(['model', *words])})"

    @property
    def modes(self) -> tuple[bool, ...]:
        """The modes (``training``) in which the model must compute the same as before."""
        return {
            "identical": (False, True),
            "train_identical": (True,),
            "eval_identical": (False,),
            "retrain": (),
        }[self.safety]
