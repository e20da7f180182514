"""Arm: one side of a comparison, and its grammar: `batch+adamw+dropout:0.2+placement:after+init:0.1`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from normkit.lab.errors import LabError, nearest
from normkit.lab.shares import in_steps

OPTIMIZERS = ("sgd", "momentum", "adamw")
PLACEMENTS = ("before", "after")
RESIDUALS = ("plain", "none", "skipinit", "fixup", "normalizer-free")
OPTIONS = ("dropout", "init", "placement", "running", "processes", "residual", "clip")
WORDS = ("placement", "residual")
STEP_SIZE = ("lr/", "rewarm:", "keep")
"""Parts that belong to the phase before them."""
ADDED: dict[str, Any] = {
    "running": None,
    "processes": 1,
    "residual": "plain",
    "clip": None,
    "strategy": "",
    "choices": (),
}
"""In a record only where they are used: older questions keep their hash."""
GRAMMAR = (
    "an arm is a norm and what goes with it, joined by +: none, batch, group:8, none+adamw, batch+momentum, "
    "batch+dropout:0.2, batch+placement:after, none+init:0.1, batch+running:0.02, batch:synchronized+processes:2, "
    "none+residual:skipinit, none+residual:normalizer-free+clip:0.02, batch->frozen@25%+lr/10, taper@20%-60%"
)


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: a norm together with what it is combined with.

    norm: what `normkit.create` takes ("none", "batch", "group:8", ...). optimizer: sgd, momentum (SGD with momentum
    0.9), adamw, or None for the task's own. placement: norm before or after the activation. dropout: probability
    behind each activation. init: gain, a factor on every initial weight of linear, convolutional and recurrent layers.
    running: share of each batch in a batch norm's running statistics (torch's `momentum=`), or None for the layer's
    own. processes: how many train the network together, each on its part of every batch, averaging their gradients.
    residual: how a residual task adds its branches: plain (x + branch), none (no skip), skipinit, fixup,
    normalizer-free. clip: adaptive gradient clipping before every step (the last linear layer is left out), or None.
    strategy: what changes the norms during training, as `normkit.strategies.parse` reads it. choices: what else the
    task's model builder is asked for, by its parameters' names: `layer+qk:rms` calls `model(norm_layer, qk="rms")`.
    """

    norm: str = "none"
    optimizer: str | None = None
    placement: str = "before"
    dropout: float = 0.0
    init: float = 1.0
    running: float | None = None
    processes: int = 1
    residual: str = "plain"
    clip: float | None = None
    strategy: str = ""
    choices: tuple[tuple[str, float | str], ...] = ()

    def __post_init__(self) -> None:
        if self.optimizer is not None and self.optimizer not in OPTIMIZERS:
            raise LabError(
                f"unknown optimizer {self.optimizer!r}{nearest(self.optimizer, OPTIMIZERS)} "
                f"(known: {', '.join(OPTIMIZERS)})"
            )
        if self.placement not in PLACEMENTS:
            raise LabError(f"placement:{self.placement} is neither placement:before nor placement:after the activation")
        if not 0 <= self.dropout < 1:
            raise LabError(f"dropout:{self.dropout:g} is no probability; choose 0 <= dropout < 1, e.g. dropout:0.2")
        if not 0 < self.init < float("inf"):
            raise LabError(f"init:{self.init:g} is no gain; choose a positive factor on the initial weights")
        if self.running is not None and not 0 < self.running <= 1:
            raise LabError(
                f"running:{self.running:g} is no share of a batch; choose 0 < running <= 1, e.g. running:0.02"
            )
        if not (self.processes >= 1 and float(self.processes).is_integer()):
            raise LabError(f"processes:{self.processes:g} is no number of processes; choose 1, 2, 3 ...")
        if self.residual not in RESIDUALS:
            raise LabError(
                f"residual:{self.residual} is unknown{nearest(self.residual, RESIDUALS)}; "
                f"choose from: {', '.join(RESIDUALS)}"
            )
        if self.clip is not None and not 0 < self.clip < float("inf"):
            raise LabError(f"clip:{self.clip:g} is no ratio of gradient and weight; choose e.g. clip:0.02")

    @property
    def name(self) -> str:
        """The arm in its own grammar, with nothing that is a default: the key of every table."""
        parts = [f"{self.norm}->{self.strategy.replace(' -> ', '->')}" if self.strategy else self.norm]
        parts += [self.optimizer] if self.optimizer else []
        parts += [f"dropout:{self.dropout:g}"] if self.dropout else []
        parts += [f"placement:{self.placement}"] if self.placement != "before" else []
        parts += [f"init:{self.init:g}"] if self.init != 1 else []
        parts += [f"running:{self.running:g}"] if self.running is not None else []
        parts += [f"processes:{self.processes}"] if self.processes != 1 else []
        parts += [f"residual:{self.residual}"] if self.residual != "plain" else []
        parts += [f"clip:{self.clip:g}"] if self.clip is not None else []
        parts += [f"{key}:{value if isinstance(value, str) else format(value, 'g')}" for key, value in self.choices]
        return "+".join(parts)

    def record(self, optimizer: str) -> dict[str, Any]:
        """The arm as experiment.json has it; optimizer: the task's own, for an arm that names none."""
        fields = asdict(self) | {"optimizer": self.optimizer or optimizer}
        if self.choices:
            fields["choices"] = dict(self.choices)
        return {"name": self.name} | {
            key: value for key, value in fields.items() if key not in ADDED or value != ADDED[key]
        }

    def with_knob(self, knob: str, value: float) -> Arm:
        """The arm with one of its own knobs (init, dropout) set to a value of a sweep."""
        if knob == "init":
            return replace(self, init=float(value))
        return replace(self, dropout=float(value))


def parse_arm(text: str) -> Arm:
    """Reads one arm, e.g. `batch+dropout:0.2+adamw`; raises LabError with the nearest word when one is unknown."""
    parts = _whole_phases([part.strip() for part in text.split("+")])
    if not all(parts):
        raise LabError(f"arm {text!r} has an empty part; {GRAMMAR}")
    optimizers = [part.lower() for part in parts if part.lower() in OPTIMIZERS]
    options = [part for part in parts if part.split(":")[0].lower() in OPTIONS]
    phases = [part for part in parts if "->" in part or "@" in part or part.startswith("recalibrate/")]
    norms = [part for part in parts if part.lower() not in OPTIMIZERS and part not in (*options, *phases)]
    choices = [part for part in norms if ":" in part and not _is_norm(part)]
    norms = [part for part in norms if part not in choices] or ([] if phases else choices[:1])
    if sorted(optimizers) == ["momentum", "sgd"]:
        optimizers = ["momentum"]  # `sgd+momentum` says the same in more words
    if len(optimizers) > 1:
        raise LabError(f"arm {text!r} names {len(optimizers)} optimizers ({', '.join(optimizers)}); choose one")
    strategy = ""
    if phases:
        start, strategy = _read_phases(text, phases)
        norms.insert(0, start)
    if len(norms) > 1:
        raise LabError(
            f"arm {text!r} has a part that is unknown: {norms[1]!r}"
            f"{nearest(norms[1].split(':')[0], (*OPTIMIZERS, *OPTIONS))}; {GRAMMAR}"
        )
    if not norms:
        raise LabError(f"arm {text!r} names no norm; write none+{text} for a network without normalization")
    return Arm(
        norm=check_norm(norms[0]),
        optimizer=optimizers[0] if optimizers else None,
        strategy=strategy,
        choices=_read_choices(text, [choice for choice in choices if choice not in norms]),
        **_read_options(text, options),
    )


def parse_arms(arms: str | Iterable[str | Arm]) -> tuple[Arm, ...]:
    """Reads the arms of a comparison from `none, batch, none+adamw` or from a list of arms; each may occur once."""
    items: Sequence[str | Arm] = _split(arms) if isinstance(arms, str) else list(arms)
    parsed = tuple(arm if isinstance(arm, Arm) else parse_arm(arm) for arm in items)
    if not parsed:
        raise LabError(f"no arms to compare; {GRAMMAR}")
    names = [arm.name for arm in parsed]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise LabError(f"arm {twice[0]!r} is given {names.count(twice[0])} times; give each arm once")
    return parsed


def check_norm(spec: str) -> str:
    """The norm as typed when `normkit.create` knows it, otherwise LabError with its suggestion.

    Features are chosen so that every number of groups divides them; whether the number divides the channels of a
    network only the network can say.
    """
    from normkit.lab.norm_layer import NormLayer, is_token_norm

    counted = in_steps(spec, 100)  # of any run
    argument = counted.partition(":")[2]
    channels = 64 * int(argument) if argument.isdigit() and int(argument) > 0 else 64
    try:
        NormLayer(counted, dim=1 if is_token_norm(spec) else 2)(64 if is_token_norm(spec) else channels)
    except (ValueError, TypeError) as error:
        raise LabError(f"arm {spec!r}: {error}") from None
    return spec


def _is_norm(part: str) -> bool:
    """Whether the word before the colon names a norm."""
    from normkit.lab.norm_layer import is_token_norm
    from normkit.vocabulary.spec import find

    try:
        return is_token_norm(part) or bool(find(part.partition(":")[0]))
    except ValueError:
        return False


def _whole_phases(parts: list[str]) -> list[str]:
    """`lr/10` belongs to the phase that it follows, whether a + or a space is between them."""
    joined: list[str] = []
    for part in parts:
        if joined and part.startswith(STEP_SIZE) and "@" in joined[-1]:
            joined[-1] += f" {part}"
        else:
            joined.append(part)
    return joined


def _read_phases(text: str, phases: list[str]) -> tuple[str, str]:
    """The norm that an arm starts with, and its strategy in the one way of writing it."""
    from normkit import strategies

    if len(phases) > 1:
        raise LabError(f"arm {text!r} has {len(phases)} strategies; join their phases by ->")
    first, arrow, rest = (word.strip() for word in phases[0].partition("->"))
    starts = bool(arrow) and ("@" not in first or first.partition("@")[2].startswith("0"))
    norm = first.partition("@")[0] if starts and not strategies.is_phase(first) else ""
    try:
        strategy = str(strategies.parse(rest if norm else phases[0]))
    except ValueError as error:
        raise LabError(f"arm {text!r}: {error}") from None
    starts_with = {"select": "switchable", "progressive": "layer"}.get(strategy.partition("@")[0], "batch")
    return norm or starts_with, strategy


def _split(text: str) -> list[str]:
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise LabError(f"{text!r} has an empty place between its commas; {GRAMMAR}")
    return items


def _read_options(text: str, options: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for option in options:
        key, _, value = (word.strip().lower() for word in option.partition(":"))
        if key in values:
            raise LabError(f"arm {text!r} gives {key} twice; give it once")
        if not value:
            raise LabError(f"arm {text!r}: {key} needs a value, e.g. {_EXAMPLES[key]}")
        values[key] = value if key in WORDS else _number(text, key, value)
    if "processes" in values and values["processes"].is_integer():
        values["processes"] = int(values["processes"])
    return values


def _read_choices(text: str, choices: list[str]) -> tuple[tuple[str, float | str], ...]:
    """What is left for the model builder to know; numbers where they read as such."""
    read: dict[str, float | str] = {}
    for choice in choices:
        key, _, value = (word.strip().lower() for word in choice.partition(":"))
        if key in read:
            raise LabError(f"arm {text!r} gives {key} twice; give it once")
        if not (key and value):
            raise LabError(f"arm {text!r}: {choice!r} is no key:value; {GRAMMAR}")
        try:
            read[key] = float(value)
        except ValueError:
            read[key] = value
    return tuple(sorted(read.items()))


def _number(text: str, key: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise LabError(f"arm {text!r}: {key}:{value} is no number; write e.g. {_EXAMPLES[key]}") from None


_EXAMPLES = {
    "dropout": "dropout:0.2",
    "init": "init:0.1",
    "placement": "placement:after",
    "running": "running:0.02",
    "processes": "processes:2",
    "residual": "residual:skipinit",
    "clip": "clip:0.02",
}
