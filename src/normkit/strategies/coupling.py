"""What happens to the step size at a switch: a frozen or converted network no longer bounds it by itself."""

from __future__ import annotations

import re
from dataclasses import dataclass

GRAMMAR = "lr/10 (divide the learning rate), rewarm:100 (from 0 again over 100 steps), clip:0.02 (adaptive clipping)"


@dataclass(frozen=True)
class Coupling:
    """Divide the learning rate, warm it up again, clip gradients adaptively; any of them, from the switch on."""

    divide: float = 1.0
    rewarm: int = 0
    """Steps over which the learning rate comes up from 0 again."""
    clip: float | None = None
    """As :func:`normkit.clip_grad_adaptive_` has it."""

    def __post_init__(self) -> None:
        if not self.divide > 0 or self.rewarm < 0 or (self.clip is not None and not self.clip > 0):
            raise ValueError(f"{self!r}: divide and clip are above 0, rewarm is a number of steps")

    def __str__(self) -> str:
        words = [f"lr/{self.divide:g}"] if self.divide != 1 else []
        words += [f"rewarm:{self.rewarm}"] if self.rewarm else []
        words += [f"clip:{self.clip:g}"] if self.clip is not None else []
        return " ".join(words)


KEEP = Coupling()


def parse(words: list[str]) -> Coupling:
    """From ``["lr/10", "rewarm:100"]``.

    Raises:
        ValueError: a word that says nothing.
    """
    options: dict = {}
    for word in words:
        if match := re.fullmatch(r"lr/(\d+(?:\.\d+)?)", word):
            options["divide"] = float(match[1])
        elif match := re.fullmatch(r"rewarm:(\d+)", word):
            options["rewarm"] = int(match[1])
        elif match := re.fullmatch(r"clip:(\d+(?:\.\d+)?)", word):
            options["clip"] = float(match[1])
        elif word != "keep":
            raise ValueError(f"{word!r} does nothing to the step size.\n  write {GRAMMAR}")
    return Coupling(**options)
